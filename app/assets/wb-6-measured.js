// Figures of measurements: what stands for a head or a feature of the result carries its name as customdata, and `meta.pick` is the key of
// the address that a click sets. Clicking a chosen head again opens it on the Attention page.
(function () {
  "use strict";
  function link(gd) {
    gd.wbMeasured = true;
    gd.on("plotly_click", (event) => {
      const pick = ((gd.layout && gd.layout.meta) || {}).pick, point = event.points && event.points[0];
      if (!pick || !point || point.customdata === undefined || point.customdata === null) return;
      const value = String(Array.isArray(point.customdata) ? point.customdata[0] : point.customdata);
      if (!value) return;
      if (pick === "mh" && workbench.params().get(pick) === value) document.getElementById("probe-look")?.click();
      else workbench.change({ [pick]: value });
    });
  }
  new MutationObserver(() => {
    document.querySelectorAll(".graph .js-plotly-plot").forEach((gd) => { if (gd.on && !gd.wbMeasured) link(gd); });
  }).observe(document.documentElement, { subtree: true, childList: true });
})();
