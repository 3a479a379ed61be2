"""One self-contained HTML page: what to do, numbers with intervals, and diagrams that tell theirs."""

from bayesguard.report.page import to_html as to_html
