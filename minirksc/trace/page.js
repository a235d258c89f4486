// This only adds comfort: without it everything can be read, unfolded and printed.
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
