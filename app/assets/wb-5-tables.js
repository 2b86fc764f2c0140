// Tables of values: any element with a data-table attribute, {headers, rows}. The browser builds the cells itself; as Dash
// components two thousand cells take most of a minute.
(function () {
  "use strict";
  function draw(place) {
    const { headers, rows } = JSON.parse(place.getAttribute("data-table"));
    const cell = (kind, text, scope) => {
      const made = document.createElement(kind);
      made.textContent = text;
      if (scope) made.scope = scope;
      return made;
    };
    const line = (cells) => {
      const row = document.createElement("tr");
      row.append(...cells);
      return row;
    };
    const table = document.createElement("table");
    table.className = "value-table";
    const head = document.createElement("thead"), body = document.createElement("tbody");
    head.append(line(headers.map((name) => cell("th", name, "col"))));
    body.append(...rows.map((row) => line(row.map((text, at) => (at ? cell("td", text) : cell("th", text, "row"))))));
    table.append(head, body);
    place.replaceChildren(table);
  }
  new MutationObserver((changes) => {
    for (const change of changes) {
      if (change.type === "attributes") draw(change.target);
      else for (const node of change.addedNodes) {
        if (node.nodeType !== 1) continue;
        if (node.matches("[data-table]")) draw(node);
        node.querySelectorAll?.("[data-table]").forEach(draw);
      }
    }
  }).observe(document.documentElement, { subtree: true, childList: true, attributes: true, attributeFilter: ["data-table"] });
})();
