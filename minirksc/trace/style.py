"""Style and script of a trace's page.

Two themes as two sets of variables; print always takes the light one. Text keeps a contrast of 4.5 to 1 or more on its
ground, outlines of 3 to 1. The script only adds comfort: without it everything can be read, unfolded and printed.
"""

_LIGHT = """
--ground:#fff;--raised:#f5f6f7;--rule:#d5dade;--text:#1b2126;--quiet:#56606a;--link:#1f5f99;
--mark:#a3470b;--outline:#6d7c89;--line:#8794a0;--q0:#eaf1f8;--q1:#bcd3e8;--q2:#86afd4;--q3:#4a84b8;--q4:#1d5488;
--p0:#164672;--p1:#3f78b0;--p2:#7497bf;--p3:#868f97
"""
_DARK = """
--ground:#14181c;--raised:#1d2328;--rule:#39424a;--text:#e6e9ec;--quiet:#a3adb6;--link:#8cbdee;
--mark:#f3a55f;--outline:#8896a2;--line:#66737e;--q0:#1f2d3a;--q1:#2d4c6a;--q2:#43729e;--q3:#6ba2d3;--q4:#b3d6f7;
--p0:#b3d6f7;--p1:#6ba2d3;--p2:#4f80ad;--p3:#7c868e
"""

STYLE = (
    f"""
:root{{{_LIGHT};color-scheme:light dark}}
@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}}}}}
"""
    + """
*{box-sizing:border-box}
html{font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;color:var(--text);
background:var(--ground);font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{max-width:64rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1,h2,h3,p,ul,dl,dd,figure{margin:0;padding:0}
ul{list-style:none}
a{color:var(--link)}
:focus-visible{outline:2px solid var(--link);outline-offset:2px;border-radius:3px}
.skip{position:absolute;left:-99rem}
.skip:focus{position:static;display:inline-block;margin-bottom:.5rem}
.kind,.quiet,dt,th,.legend,.note{color:var(--quiet)}
.kind,dt,th,.legend,.note,.small{font-size:.8125rem}
.problem{margin:.75rem 0 0;padding-left:.875rem;border-left:3px solid var(--rule);overflow-wrap:anywhere;
white-space:pre-wrap}
h1{font-size:1.75rem;line-height:1.25;font-weight:650;margin:1.25rem 0 .375rem;overflow-wrap:anywhere;text-wrap:balance}
h1 .kind{display:block;font-weight:400;line-height:1.5}
h2{font-size:1.125rem;font-weight:650;margin:2.75rem 0 .75rem;padding-top:1rem;border-top:1px solid var(--rule)}
h3{font-size:.875rem;font-weight:600;margin:1.25rem 0 .5rem;color:var(--quiet)}
.lead{font-size:1.0625rem;max-width:46rem}
.note{margin-top:.5rem;max-width:46rem}
.approximate{color:var(--mark)}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));gap:.75rem 1.5rem;margin-top:1.5rem}
.figures dd{font-size:1.25rem;font-weight:600;line-height:1.3}
.figures dd .quiet{font-size:.8125rem;font-weight:400;display:block}
.scroll{overflow-x:auto;padding:.25rem 0}
svg{display:block}
svg text{font-size:12px;fill:var(--text);font-family:inherit}
.legend{display:flex;flex-wrap:wrap;gap:.375rem 1.25rem;margin-top:.75rem}
.legend li{display:flex;align-items:center;gap:.375rem}
.shape{fill:var(--ground);stroke:var(--outline);stroke-width:1.25}
.q0{fill:var(--q0)}.q1{fill:var(--q1)}.q2{fill:var(--q2)}.q3{fill:var(--q3)}.q4{fill:var(--q4)}
.root{fill:var(--raised)}
.line{fill:none;stroke:var(--line);stroke-width:1}
.line.on{stroke:var(--mark);stroke-width:2.25}
.ring{fill:none;stroke:var(--mark);stroke-width:2.25}
.cross{fill:none;stroke:var(--text);stroke-width:2}
.pruned .shape{fill-opacity:.35;stroke-dasharray:2.5 2}
.label{white-space:pre}
.node.pruned .label{fill:var(--quiet)}
.node.on .label{font-weight:650}
.node:hover .label{text-decoration:underline}
.node:focus-visible{outline:none}
.node:focus-visible .shape{stroke:var(--link);stroke-width:3}
.node:focus-visible .label{text-decoration:underline;fill:var(--link)}
.p0{fill:var(--p0)}.p1{fill:var(--p1)}.p2{fill:var(--p2)}.p3{fill:var(--p3)}
.bar{width:100%;height:1.25rem}
.bar rect{stroke:var(--ground);stroke-width:2}
.track{fill:var(--rule)}.fill{fill:var(--p1)}
.votes div{display:grid;grid-template-columns:minmax(4rem,8rem) minmax(4rem,16rem);gap:.25rem 1rem;align-items:center}
.votes dd{display:flex;align-items:center;gap:.75rem}
.votes dt{overflow-wrap:anywhere;color:var(--text);font-size:.9375rem}
summary{cursor:pointer;list-style:none;position:relative;padding-left:1.25rem}
summary::-webkit-details-marker{display:none}
summary::before{content:"";position:absolute;left:.25rem;top:.55em;width:.4rem;height:.4rem;
border:solid var(--quiet);border-width:0 1.5px 1.5px 0;transform:rotate(-45deg)}
details[open]>summary::before{transform:rotate(45deg)}
.fold{margin-top:.75rem}
.fold>summary{color:var(--quiet)}
.branch{border-bottom:1px solid var(--rule)}
.branch>summary{display:grid;grid-template-columns:7.5rem 5.5rem 9rem minmax(4rem,8rem) 1fr;gap:.25rem 1rem;
align-items:baseline;padding-top:.5rem;padding-bottom:.5rem}
.branch>summary::before{top:1.05em}
.branch>summary:hover{background:var(--raised)}
.cut{overflow:hidden;text-overflow:ellipsis;white-space:nowrap;min-width:0}
.name{font-weight:650}
.tag{font-weight:400;font-size:.8125rem;color:var(--quiet)}
.best .name,.best .tag{color:var(--mark)}
.measure{display:inline-flex;align-items:center;gap:.5rem}
.body{padding:.25rem 0 1.25rem 1.25rem;scroll-margin-top:5rem}
.body:target{box-shadow:inset 3px 0 var(--link);padding-left:1rem;margin-left:.25rem}
.text{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--raised);border-radius:6px;padding:.75rem .875rem;
max-width:50rem}
.text .quiet{unicode-bidi:isolate}
details[open]>summary .preview{display:none}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(8.5rem,1fr));gap:.625rem 1rem;margin-top:.875rem}
.facts dt,.facts dd{overflow-wrap:anywhere}
.tokens{margin-top:.5rem;font:.8125rem/1.9 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
overflow-wrap:anywhere;max-width:50rem}
.tokens i{font-style:normal;white-space:pre-wrap;padding:.125rem 0}
.tokens i:nth-child(odd){background:var(--raised)}
.tokens i:nth-child(even){background:var(--rule)}
.code{white-space:pre-wrap;overflow-wrap:anywhere;font:.8125rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,
"DejaVu Sans Mono",monospace;margin:.5rem 0 0}
table{border-collapse:collapse;width:100%;font-size:.875rem}
th{text-align:left;font-weight:400;white-space:nowrap}
th,td{padding:.375rem 1.25rem .375rem 0;border-bottom:1px solid var(--rule);vertical-align:top;overflow-wrap:break-word}
td.n,th.n{text-align:right}
td.w{width:45%}
.key{width:.75rem;height:.75rem;flex:none}
.tools{display:flex;gap:.5rem;margin-bottom:.5rem}
button{font:inherit;font-size:.8125rem;color:var(--text);background:var(--raised);border:1px solid var(--outline);
border-radius:5px;padding:.25rem .75rem;cursor:pointer}
@media (max-width:46rem){
.branch>summary{grid-template-columns:1fr auto;gap:.125rem 1rem}
.branch>summary>:nth-child(3){grid-column:1}
.branch>summary>:nth-child(4){text-align:right;font-weight:600}
.branch>summary>:nth-child(5){grid-column:1/-1}
.body{padding-left:0}
.body:target{padding-left:.75rem;margin-left:0}
.facts{grid-template-columns:repeat(auto-fill,minmax(7.5rem,1fr))}
.stack thead{position:absolute;left:-99rem}
.stack tr{display:grid;grid-template-columns:repeat(3,1fr);gap:.25rem 1rem;padding:.625rem 0;
border-bottom:1px solid var(--rule)}
.stack td{border:0;padding:0;text-align:left!important;min-width:0;width:auto}
.stack td.w{grid-column:1/-1;order:1}
.stack td.empty{display:none}
.stack td::before{content:attr(data-label);display:block;color:var(--quiet);font-size:.75rem}
}
@media print{
body{max-width:none;padding:0}
html{font-size:11pt}
.tools,.skip,.tokens,summary::before{display:none}
.scroll{overflow:visible}
details::details-content{content-visibility:visible;display:block;height:auto}
summary .preview{display:none}
.branch,tr,.facts{break-inside:avoid}
h2,h3{break-after:avoid}
a{color:inherit;text-decoration:none}
.scroll svg{max-width:100%;height:auto}
}
"""
)

SCRIPT = """
"use strict";
const branches = [...document.querySelectorAll("#branches > details, details.branch")];
const reveal = () => {
  const body = document.getElementById(location.hash.slice(1));
  if (!body) return;
  for (let fold = body.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
  body.scrollIntoView();
};
addEventListener("hashchange", reveal);
reveal();
const tools = document.querySelector(".tools");
if (tools) for (const [label, open] of [["Unfold all", true], ["Fold all", false]]) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = label;
  button.addEventListener("click", () => branches.forEach(fold => { fold.open = open; }));
  tools.append(button);
}
"""
