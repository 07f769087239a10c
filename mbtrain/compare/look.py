"""The page's style and script: all of its colours, and its few interactions. Nothing is loaded from anywhere."""

from __future__ import annotations

INK, MUTED, REST = "#1f2933", "#64707d", "#a3abb4"

# Ten colours that are told apart on white, and the same ten on black; the best group has the first.
LIGHT = ("#1f6fb4", "#d9570a", "#1e8a46", "#b3262e", "#7a4fc2", "#946215", "#c43d8e", "#0c8490", "#6f7a00", "#3d4a63")
DARK = ("#62aef0", "#ff9a52", "#5fcf86", "#ff7b7f", "#b79bf5", "#d9a756", "#f286c2", "#4fc9d4", "#c2ca4e", "#a9b7d1")


def _colours(values: tuple[str, ...]) -> str:
    return "".join(f".c{i}{{--c:{value}}}" for i, value in enumerate(values))


STYLE = (
    """
:root{color-scheme:light dark;--ink:#1f2933;--muted:#5d6875;--page:#fff;--card:#f6f7f9;--line:#dde2e7;--grid:#e9ecef;
--mark:#eef4fb}
.cx{--c:#a3abb4}
"""
    + _colours(LIGHT)
    + """
@media (prefers-color-scheme:dark){:root{--ink:#e4e8ec;--muted:#9aa5b1;--page:#14181d;--card:#1c2229;--line:#313a44;
--grid:#262d35;--mark:#212c38}.cx{--c:#6b7580}"""
    + _colours(DARK)
    + """}
*{box-sizing:border-box}
body{margin:0 auto;padding:28px 32px 48px;max-width:1500px;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI","Liberation Sans",sans-serif}
h1{font-size:26px;line-height:1.2;margin:0 0 4px}
h2{font-size:21px;margin:44px 0 2px;padding-top:18px;border-top:2px solid var(--line)}
h3{font-size:16px;margin:30px 0 8px}
p{margin:4px 0 10px;max-width:95ch}
.muted,small{color:var(--muted)} small{font-size:13px}
.lead{font-size:17px}
.name,td.key,pre,code{font-family:ui-monospace,"SF Mono","DejaVu Sans Mono","Liberation Mono",monospace;font-size:13px}
.name{overflow-wrap:anywhere} li .name{white-space:nowrap}
.swatch{display:inline-block;width:12px;height:12px;border-radius:3px;background:var(--c);margin-right:7px;
vertical-align:-1px;flex:none}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:10px 0 6px;padding:0;list-style:none}
.legend li{cursor:default}
.key-of{display:flex;flex-wrap:wrap;gap:2px 20px;font-size:13px;color:var(--muted);margin:0 0 8px}
.key-of svg{width:28px;height:12px;vertical-align:-1px;margin-right:5px}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(340px,1fr));gap:14px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 8px 6px}
figcaption{font-size:13px;color:var(--muted);padding:0 8px 4px}
figure svg{width:100%;height:auto;display:block}
svg text{font-size:11px;fill:var(--muted)} svg .label{fill:var(--ink);font-size:12px}
.grid{stroke:var(--grid)} .axis{stroke:var(--muted)}
.train{fill:none;stroke:var(--c);stroke-width:1.7;stroke-linejoin:round}
.band{fill:var(--c);opacity:.16;stroke:none}
path.val,path.partial{fill:none;stroke:var(--c);stroke-width:.8;stroke-dasharray:2 3}
circle.val{fill:var(--c);stroke:var(--card)} circle.partial{fill:var(--card);stroke:var(--c);stroke-width:1.4}
.reach{stroke:var(--c);stroke-width:1.2}
.cx .train{stroke-width:.9}
.bar{width:104px;height:16px;display:block} .rule{stroke:var(--line)} .whisker{stroke:var(--c);stroke-width:3}
.dot{fill:var(--c)}
.lit .curve{opacity:.12} .lit .curve.on{opacity:1} .on .train{stroke-width:2.6}
.wide{overflow-x:auto;width:fit-content;max-width:100%;border:1px solid var(--line);border-radius:8px;margin:0 0 10px}
table{border-collapse:collapse;min-width:60%;font-variant-numeric:tabular-nums;font-size:13.5px}
th{font-weight:600;font-size:12.5px;line-height:1.25;color:var(--muted);vertical-align:bottom;background:var(--card)}
th,td{padding:6px 9px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
tr:last-child td{border-bottom:0}
th.left,td.left{text-align:left}
th:first-child,td:first-child{position:sticky;left:0;background:var(--card);text-align:left;z-index:1}
td:first-child{background:var(--page)}
tr.on td{background:var(--mark)}
th button{all:unset;cursor:pointer} th button:hover,th button:focus-visible{color:var(--ink);text-decoration:underline}
th[aria-sort=ascending] button:after{content:" ↑"} th[aria-sort=descending] button:after{content:" ↓"}
td b{font-weight:650} td small{display:block;line-height:1.25;font-size:12px}
td:first-child small{display:inline} td p{margin:0 0 0 19px;font-size:12px;line-height:1.25;color:var(--muted)}
td.set{text-align:left;white-space:normal;min-width:90px;max-width:260px;overflow-wrap:anywhere;font-size:13px}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(330px,1fr));gap:14px;align-items:start}
.samples figcaption{padding:2px 4px 8px;color:var(--ink)}
pre{margin:0;padding:10px 12px;background:var(--page);border:1px solid var(--line);border-radius:6px;
white-space:pre-wrap;overflow-wrap:anywhere;max-height:320px;overflow-y:auto;line-height:1.4;tab-size:4}
img{max-width:100%;width:100%;image-rendering:pixelated;border-radius:6px;display:block} audio{width:100%;display:block}
details{margin:10px 0} summary{cursor:pointer;color:var(--muted)} summary:hover{color:var(--ink)}
ul.notes{margin:4px 0;padding-left:20px;color:var(--muted);font-size:14px}
@media print{body{max-width:none;padding:0}.wide{overflow:visible}}
"""
)

SCRIPT = """
"use strict";
for (const part of document.querySelectorAll("section")) {
  const of = g => part.querySelectorAll(`[data-g="${g}"]`);
  const light = (g, on) => {
    part.classList.toggle("lit", on);
    for (const one of of(g)) one.classList.toggle("on", on);
  };
  for (const one of part.querySelectorAll("[data-g]")) {
    one.addEventListener("mouseenter", () => light(one.dataset.g, true));
    one.addEventListener("mouseleave", () => light(one.dataset.g, false));
  }
}
for (const table of document.querySelectorAll("table.sorted")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, at) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = row => row.cells[at].dataset.v ?? row.cells[at].textContent;
      const numbers = head.classList.contains("left") ? null : row => parseFloat(value(row));
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        if (!numbers) return (up ? 1 : -1) * value(a).localeCompare(value(b));
        const [x, y] = [numbers(a), numbers(b)];
        return isNaN(x) - isNaN(y) || (up ? x - y : y - x);
      });
      table.tBodies[0].append(...rows);
    });
  });
}
"""
