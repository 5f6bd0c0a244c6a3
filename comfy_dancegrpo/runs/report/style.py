"""How the report looks, light and dark, on a screen and on paper."""

STYLE = """
:root { color-scheme: light dark; --paper: #fbfbfa; --card: #fff; --ink: #1f2328; --quiet: #636c76; --edge: #dfe3e8; --accent: #2563eb; --second: #c2410c;
  --good: #15803d; --bad: #b91c1c; --soft: #f1f3f5; }
@media (prefers-color-scheme: dark) { :root { --paper: #0f1216; --card: #171b21; --ink: #e3e6ea; --quiet: #9aa4af; --edge: #2b323b; --accent: #7ab0ff;
  --second: #fdba74; --good: #4ade80; --bad: #f87171; --soft: #20262e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 64px; }
h1 { margin: 0; font-size: 26px; overflow-wrap: anywhere; }
h2 { margin: 36px 0 10px; font-size: 18px; }
p { margin: 6px 0; max-width: 80ch; }
.quiet { color: var(--quiet); font-size: 13px; }
.state { display: inline-block; margin-left: 10px; padding: 1px 10px; border-radius: 99px; background: var(--soft); font-size: 13px; font-weight: 600;
  vertical-align: middle; }
.notice { border-left: 3px solid var(--bad); padding: 4px 12px; background: var(--soft); overflow-wrap: anywhere; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 10px; margin: 18px 0; }
.facts div, figure, details, .table { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; }
.facts div { padding: 10px 14px; }
.facts b { display: block; font-size: 16px; font-weight: 600; overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 12px; }
figure { margin: 0; padding: 10px 12px; }
figcaption { font-size: 13px; font-weight: 600; overflow-wrap: anywhere; }
figure svg { display: block; width: 100%; height: auto; }
figure.wide { overflow-x: auto; }
figure.wide svg { min-width: 620px; }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { padding: 6px 12px; text-align: left; border-bottom: 1px solid var(--edge); vertical-align: top; overflow-wrap: anywhere; }
tr:last-child td { border-bottom: 0; }
th { color: var(--quiet); font-weight: 600; font-size: 13px; }
th:first-child, td:first-child { min-width: 110px; }
td.n, th.n { text-align: right; white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); }
.bar { display: flex; height: 18px; margin: 0 0 10px; border-radius: 5px; overflow: hidden; background: var(--soft); }
.bar i { display: block; }
.key { display: inline-block; width: 10px; height: 10px; margin-right: 7px; border-radius: 3px; }
.point { display: grid; grid-template-columns: 170px 1fr; gap: 14px; padding: 10px 0; border-top: 1px solid var(--edge); }
.point:first-of-type { border-top: 0; }
.point p { margin: 0; overflow-wrap: anywhere; }
.row { display: flex; flex-wrap: wrap; gap: 8px; }
.pair { display: flex; flex-direction: column; gap: 4px; min-width: 0; }
.pair .row { flex-wrap: nowrap; }
.shot { width: 140px; }
.row .shot { flex: 0 1 140px; min-width: 0; }
.shot img { display: block; width: 100%; border-radius: 5px; }
.shot span { font-size: 12px; color: var(--quiet); }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 18px; }
.prompt { font-size: 13px; overflow-wrap: anywhere; }
details { padding: 8px 14px; margin: 0 0 8px; }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
details .table { border: 0; }
@media (max-width: 640px) { .point { grid-template-columns: 1fr; } .grid { grid-template-columns: 1fr; } }
@media print { main { max-width: none; } figure, .point, .pair { break-inside: avoid; } }
"""
PHASES = ("#2563eb", "#0d9488", "#d97706", "#9333ea", "#be123c", "#65a30d", "#64748b")
