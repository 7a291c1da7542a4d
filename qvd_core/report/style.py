"""The style sheet of the report's page."""

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1f24; --faint: #57606a; --line: #d8dce1;
  --before: #d55e00; --after: #0072b2; --card: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #181b20; --ink: #e8eaed; --faint: #a3abb5; --line: #3a4048;
    --before: #f0a04b; --after: #56b4e9; --card: #20242a; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 75rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1rem 0 .4rem; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
.faint, figcaption { color: var(--faint); margin: .2rem 0; overflow-wrap: anywhere; }
figcaption { font-size: .87rem; max-width: 45rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.6rem, 1fr)); gap: .6rem; margin: 1rem 0 0; }
.tiles > div { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; display: flex;
  flex-direction: column; }
.tiles dd { margin: 0; font-size: 1.25rem; font-weight: 650; color: var(--after); }
.tiles dt { color: var(--faint); font-size: .87rem; line-height: 1.3; }
.scroll { overflow-x: auto; }
:focus-visible { outline: 2px solid var(--after); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
tbody th { font-weight: 400; }
thead th { color: var(--faint); font-weight: 600; white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
#layers ~ * tbody th, code { font-family: ui-monospace, monospace; font-size: .87em; }
td { overflow-wrap: anywhere; }
details { margin: .4rem 0; }
summary { cursor: pointer; padding: .2rem 0; }
ul { margin: .2rem 0; padding-left: 1.4rem; columns: 14rem auto; overflow-wrap: anywhere; }
.bar { height: .9rem; border-radius: .2rem; }
.bar.before { background: var(--before); }
.bar.after { background: var(--after); }
.figures, .halves { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 2rem; align-items: start; }
figure { margin: 0; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
img { max-width: 100%; height: auto; display: block; }
@media (max-width: 50rem) {
  h1 { font-size: 1.3rem; }
  .figures, .halves { grid-template-columns: minmax(0, 1fr); }
  .half img { min-width: 30rem; }
  .wide img { min-width: 40rem; }
}
@media print {
  :root { color-scheme: light; --paper: #ffffff; --ink: #000000; --faint: #444444; --line: #bbbbbb;
    --before: #d55e00; --after: #0072b2; --card: #f6f7f9; }
  body { font-size: 10pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  .scroll { overflow: visible; }
  .half img, .wide img { min-width: 0; }
  figure, tr, .tiles > div { break-inside: avoid; }
  h2 { break-after: avoid; }
  thead { display: table-header-group; }
  table { font-size: 8pt; }
}
"""
