"use strict";
// Numbers of a point: shown on hover, touch, and with the arrow keys once a diagram has the focus.
const tip = document.getElementById("tip");
let shown = null;

function show(point) {
  if (shown) shown.classList.remove("on");
  shown = point;
  tip.hidden = !point;
  if (!point) return;
  point.classList.add("on");
  tip.textContent = point.dataset.tip;
  const box = point.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const left = Math.min(Math.max(4, box.left + box.width / 2 - own.width / 2), window.innerWidth - own.width - 4);
  const above = box.top - own.height - 6;
  tip.style.left = left + "px";
  tip.style.top = (above > 4 ? above : box.bottom + 6) + "px";
}

for (const point of document.querySelectorAll("svg .pt")) {
  const title = point.querySelector("title");
  point.dataset.tip = title.textContent;
  title.remove(); // or the browser would show it as well
}
for (const event of ["pointerover", "pointerdown"])
  document.addEventListener(event, (e) => show(e.target.closest ? e.target.closest("svg .pt") : null));
document.addEventListener("scroll", () => show(null), { passive: true, capture: true });
for (const svg of document.querySelectorAll("svg.chart")) {
  const points = [...svg.querySelectorAll(".pt")];
  if (!points.length) continue;
  svg.setAttribute("tabindex", "0");
  svg.addEventListener("blur", () => show(null));
  svg.addEventListener("keydown", (e) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[e.key];
    if (e.key === "Escape") show(null);
    if (!step) return;
    e.preventDefault();
    const at = points.indexOf(shown);
    show(points[at < 0 ? (step > 0 ? 0 : points.length - 1) : (at + step + points.length) % points.length]);
  });
}

// The threshold: every setting of the slider has its exact counts in the page.
const source = document.getElementById("thresholds");
if (source) {
  const data = JSON.parse(source.textContent), slider = document.getElementById("threshold");
  const percent = (share) => (100 * share).toFixed(1) + "%";

  function wilson(wrong, kept, elements) {
    const n = kept / elements, rate = wrong / kept, z = data.z;
    const centre = (rate + (z * z) / (2 * n)) / (1 + (z * z) / n);
    const half = (z / (1 + (z * z) / n)) * Math.sqrt((rate * (1 - rate)) / n + (z * z) / (4 * n * n));
    return [Math.max(0, centre - half), Math.min(1, centre + half)];
  }

  function set(index) {
    slider.value = index;
    const threshold = data.thresholds[index], text = String(threshold);
    slider.setAttribute("aria-valuetext", "confidence of at least " + text);
    document.getElementById("threshold-now").textContent = text;
    document.getElementById("threshold-link").setAttribute("href", "#threshold=" + text);
    data.curves.forEach((curve, row) => {
      const kept = curve.kept[index], wrong = curve.wrong[index], total = curve.kept[0];
      const put = (name, value) => { document.getElementById(name + "-" + row).textContent = value; };
      put("share", percent(kept / total));
      put("kept", kept.toLocaleString("en"));
      put("wrong", wrong.toLocaleString("en"));
      const limits = kept ? wilson(wrong, kept, curve.elements) : null;
      put("rate", kept ? percent(wrong / kept) : "no answers");
      put("interval", kept ? "[" + percent(limits[0]) + ", " + percent(limits[1]) + "]" : "");
      const mark = document.getElementById("now-" + row), plot = mark.ownerSVGElement.dataset;
      mark.setAttribute("visibility", kept ? "visible" : "hidden");
      if (!kept) return;
      mark.setAttribute("cx", Number(plot.left) + (kept / total) * Number(plot.width));
      mark.setAttribute("cy", Number(plot.bottom) - (wrong / kept / Number(plot.top)) * Number(plot.height));
    });
  }

  function follow() {
    const asked = /^#threshold=([0-9.]+)$/.exec(location.hash);
    if (!asked || !(Number(asked[1]) >= 0)) return;
    const at = data.thresholds.findIndex((value) => value >= Number(asked[1]) - 1e-9);
    set(at < 0 ? data.thresholds.length - 1 : at);
  }

  slider.addEventListener("input", () => set(Number(slider.value)));
  window.addEventListener("hashchange", follow);
  set(Number(slider.getAttribute("value")));
  follow();
}
