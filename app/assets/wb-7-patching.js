// A click on a patching grid puts its cell into the basket of the Intervene page: `meta.basket` has the line with {x} and {y} to fill in,
// the names of the rows, and the text that it runs on. A basket made for another text begins anew.
(function () {
  "use strict";
  function link(gd) {
    gd.wbBasket = true;
    gd.on("plotly_click", (event) => {
      const basket = ((gd.layout && gd.layout.meta) || {}).basket, point = event.points && event.points[0];
      if (!basket || !point) return;
      const line = basket.line.replace("{y}", basket.rows[point.y]).replace("{x}", String(point.x));
      const params = workbench.params();
      const kept = params.get("on") === basket.on ? (params.get("do") || "").split("\n").filter(Boolean) : [];
      workbench.change({ do: [...kept.filter((each) => each !== line), line].join("\n"), on: basket.on, result: null }, { page: "/intervene" });
    });
  }
  new MutationObserver(() => {
    document.querySelectorAll(".graph .js-plotly-plot").forEach((gd) => { if (gd.on && !gd.wbBasket) link(gd); });
  }).observe(document.documentElement, { subtree: true, childList: true });
})();
