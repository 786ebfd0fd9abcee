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
