// The basket of the Intervene page and the address say the same. What is typed goes into the address at once; what the address says
// otherwise (the back button, a cell of a patching grid) goes into the form. Views that answer to what was typed are told apart by `sent`.
(function () {
  "use strict";
  const none = () => window.dash_clientside.no_update;
  const lines = (text) => (text || "").split("\n").map((line) => line.trim()).filter(Boolean).join("\n");
  const texts = (text) => (text || "").split("\n").filter((line) => line.trim()).join("\n");
  const both = (text, prompts) => `${text}\u0000${prompts}`;
  let sent = [];

  Object.assign(window.dash_clientside.workbench, {
    basket_to_address: function (text, prompts, first) {
      const next = both(lines(text), texts(prompts)), params = workbench.params();
      const shown = both(params.get("do") ?? lines(first && first.text), params.get("on") ?? texts(first && first.prompts));
      if (location.pathname !== "/intervene" || next === shown) return none();
      const [basket, read] = next.split("\u0000");
      if (Math.max(basket.length, read.length) > first.longest) return none();
      sent.push(next);
      workbench.change({ do: basket || null, on: read || null }, { replace: true });
      return none();
    },
    basket_from_address: function (view, text, prompts) {
      if (!view || view.page !== "intervene") { sent = []; return [none(), none()]; }
      const at = sent.lastIndexOf(both(view.basket, view.prompts));
      if (at >= 0) sent = sent.slice(at + 1);
      if (at >= 0 || sent.length || !view.basket) return [none(), none()];
      return [view.basket === lines(text) ? none() : view.basket, view.prompts === texts(prompts) ? none() : view.prompts];
    },
  });
})();
