"""The style sheet of the HTML report. Colours are variables, so that plots follow light and dark too."""

CSS = """\
:root {
  color-scheme: light dark;
  --page: #fcfcfb; --ink: #1c1d1f; --quiet: #6b6e74; --rule: #e3e3df; --wash: #f4f4f1;
  --pass: #1b7a43; --pass-wash: #e4f3ea; --fail: #b3261e; --fail-wash: #fbe7e5;
  --unsure: #8a5a00; --unsure-wash: #fbf0d9; --other: #7a3d91; --other-wash: #f3e8f7;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #16171a; --ink: #e7e7e4; --quiet: #9a9da4; --rule: #2e3036; --wash: #1e2024;
    --pass: #6fcf97; --pass-wash: #173324; --fail: #ff8a80; --fail-wash: #431d1a;
    --unsure: #f2c464; --unsure-wash: #3a2e14; --other: #d7a3ea; --other-wash: #33213b;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 48px 28px 72px; }
.kicker { margin: 0; color: var(--quiet); font-size: 13px; }
h1 { margin: 2px 0 14px; font-size: 38px; line-height: 1.15; letter-spacing: -0.02em; font-weight: 650; }
h2 { margin: 0 0 12px; font-size: 19px; font-weight: 620; }
section { margin-top: 44px; }
code, pre { font: 0.92em/1.5 ui-monospace, SFMono-Regular, Menlo, monospace; }
pre { overflow-x: auto; padding: 12px 14px; border-radius: 6px; background: var(--wash); }
p { max-width: 78ch; }
.facts, .legend { color: var(--quiet); font-size: 14px; }
.verdicts { margin: 0 0 18px; padding: 0; list-style: none; }
.verdicts li { display: flex; gap: 12px; align-items: baseline; padding: 3px 0; }
.verdicts .badge { flex: none; }
.remarks { margin: 18px 0 0; padding-left: 18px; color: var(--quiet); font-size: 14px; }
.remarks strong { color: var(--unsure); font-weight: 620; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 14px 7px 0; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--rule); font-weight: 400; }
thead th { vertical-align: bottom; color: var(--quiet); font-size: 13px; border-bottom-color: var(--quiet); }
thead small { display: block; font-size: 12px; }
.scroll + .scroll { margin-top: 22px; }
.scroll + .scroll table { width: auto; }
.group { padding-top: 22px; }
tbody th { font-weight: 560; }
tbody th code { font-weight: 400; }
.number { text-align: right; }
.quiet { color: var(--quiet); }
.badge { display: inline-block; padding: 1px 8px; border-radius: 4px; font-size: 12px; font-weight: 600; white-space: nowrap; }
.badge.pass, .badge.improved { color: var(--pass); background: var(--pass-wash); }
.badge.fail { color: var(--fail); background: var(--fail-wash); }
.badge.inconclusive { color: var(--unsure); background: var(--unsure-wash); }
.badge.not_comparable { color: var(--other); background: var(--other-wash); }
.badge.informs { padding-left: 0; color: var(--quiet); font-weight: 400; font-size: 14px; }
h1.pass, h1.improved { color: var(--pass); }
h1.fail { color: var(--fail); }
h1.inconclusive { color: var(--unsure); }
h1.not_comparable { color: var(--other); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 26px 40px; }
figure { margin: 0; }
figcaption { font-size: 14px; color: var(--quiet); }
figcaption code { color: var(--ink); margin-right: 6px; }
.forest { display: block; width: 100%; max-width: 620px; height: auto; font: 12.5px system-ui, "Segoe UI", sans-serif; }
.forest text { fill: var(--ink); font-variant-numeric: tabular-nums; }
.forest .tick, .forest .threshold-label { fill: var(--quiet); font-size: 11.5px; }
.forest .axis { stroke: var(--rule); }
.forest .neutral { stroke: var(--quiet); stroke-width: 1; }
.forest .threshold { stroke: var(--fail); stroke-width: 1; stroke-dasharray: 4 3; }
.forest .harm { fill: var(--fail); opacity: 0.06; }
.forest .interval { stroke: var(--tone); stroke-width: 2.5; stroke-linecap: round; }
.forest .estimate { fill: var(--tone); }
.forest .dot { fill: var(--quiet); opacity: 0.55; }
.forest g { --tone: var(--quiet); }
.forest g.pass, .forest g.improved { --tone: var(--pass); }
.forest g.fail { --tone: var(--fail); }
.forest g.inconclusive { --tone: var(--unsure); }
.forest g.not_comparable { --tone: var(--other); }
details { margin-top: 10px; }
summary { cursor: pointer; font-weight: 560; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 10px 0 18px; font-size: 14px; }
dd { margin: 0; overflow-wrap: anywhere; }
@media print { main { padding: 0; } details { display: block; } }
"""
