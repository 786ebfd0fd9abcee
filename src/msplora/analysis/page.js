"use strict";
// Opens or closes all tables at once. Without JavaScript each opens by itself, and the button is hidden.
const button = document.getElementById("open-all");
const tables = document.querySelectorAll("details");
button.hidden = tables.length === 0;
button.addEventListener("click", () => {
  const open = button.textContent === "Open all tables";
  for (const table of tables) table.open = open;
  button.textContent = open ? "Close all tables" : "Open all tables";
});
// Cells too small for their number tell it, and their layers, under the pointer: written when it gets there, as there are thousands.
document.addEventListener("mouseover", (event) => {
  const cell = event.target.closest(".most td");
  if (!cell || cell.title) return;
  const table = cell.closest("table");
  const column = table.tHead.rows[0].cells[cell.cellIndex];
  cell.title = `${cell.parentNode.cells[0].textContent}, ${column.textContent}: ${cell.textContent}`;
});
