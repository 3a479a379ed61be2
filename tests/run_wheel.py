"""Build the wheel, install it into an empty environment outside the repository, and run the README's quick start there.

Not collected by pytest: `make wheel` and CI run it.
"""

import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command, show it, and return what it printed."""
    print("$", *command, flush=True)
    done = subprocess.run([str(part) for part in command], cwd=cwd, text=True, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout}\nexit status {done.returncode}")
    return done.stdout


def main() -> None:
    """Exit with a message where something fails."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT, cwd=folder)
        (wheel,) = folder.glob("*.whl")
        venv.create(folder / "empty", with_pip=True)
        python = folder / "empty" / "bin" / "python"
        pip = (python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt")
        run(*pip, "torch", cwd=folder)
        run(*pip, wheel, cwd=folder)
        quick_start = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
        (folder / "quick_start.py").write_text(quick_start)
        printed = run(python, "quick_start.py", cwd=folder)
        print(printed)
        if "accuracy" not in printed:
            sys.exit("the quick start printed no table")
        print(run(folder / "empty" / "bin" / "bayesguard", "--version", cwd=folder))
        where = run(python, "-c", "import bayesguard; print(bayesguard.__file__)", cwd=folder)
        if not where.startswith(str(folder.resolve())):
            sys.exit(f"the wheel was not what ran: {where}")


if __name__ == "__main__":
    main()
