// A click on a column's head sorts the table by it, the best or first on top; another click turns it round.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const ascending = head.ariaSort ? head.ariaSort !== "ascending" : !("descending" in head.dataset);
      const key = row => row.cells[column].dataset.value ?? row.cells[column].innerText;
      const isNumber = head.classList.contains("number");
      const compare = (a, b) => isNumber ? a - b : a.localeCompare(b);
      const rows = [...table.tBodies[0].rows];
      const [known, unknown] = [rows.filter(row => key(row) !== ""), rows.filter(row => key(row) === "")];
      known.sort((a, b) => (ascending ? 1 : -1) * compare(key(a), key(b)));
      table.tBodies[0].append(...known, ...unknown);
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.ariaSort = ascending ? "ascending" : "descending";
    });
  });
}
