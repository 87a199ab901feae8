"use strict";
// The page is whole without this: it adds sorting, filtering, and opens what is folded before printing.
const text = (cell) => cell.dataset.value ?? cell.textContent.trim();
function compare(a, b, up) {
  const [x, y] = [text(a), text(b)];
  if (x === "" || y === "") return (x === "") - (y === "");
  const numbers = !isNaN(x) && !isNaN(y);
  const order = numbers ? x - y : x.localeCompare(y, "en", { numeric: true });
  return up ? order : -order;
}
function sort(table, column, head) {
  const up = head.getAttribute("aria-sort") ? head.getAttribute("aria-sort") === "descending" : !head.classList.contains("number");
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const rows = [...table.tBodies[0].rows].sort((a, b) => compare(a.cells[column], b.cells[column], up));
  table.tBodies[0].append(...rows);
}
for (const table of document.querySelectorAll("table[data-filter]")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    if ("fixed" in head.dataset) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => sort(table, column, head));
  });
  if (table.tBodies[0].rows.length < 3) continue;
  const box = document.createElement("input");
  box.type = "search";
  box.className = "filter";
  box.placeholder = box.ariaLabel = table.dataset.filter;
  box.addEventListener("input", () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of table.tBodies[0].rows) {
      const all = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => all.includes(word));
    }
  });
  table.parentElement.before(box);
}
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open], .more)")];
  for (const details of opened) details.open = true;
});
addEventListener("afterprint", () => {
  for (const details of opened) details.open = false;
});
