// The view lives in the URL. Everything that changes it goes through workbench.change, everything that shows it listens to
// the popstate event that change sends; the server resolves the same URL to the same view.
window.workbench = (function () {
  "use strict";
  const facts = { run: "", tokens: [], heads: [] };
  const PER_RUN = ["q", "k", "rows", "cols", "srows", "scols", "t", "t2", "track", "syn", "depth", "urows", "ucols"];
  const PER_PAIR = ["urows", "ucols"];
  const PER_STATE = ["srows", "scols", "track"];

  const params = () => new URLSearchParams(location.search);
  const number = (key) => {
    const text = params().get(key);
    return text !== null && /^\d{1,8}$/.test(text) ? Number(text) : null;
  };
  const query = () => number("q");
  const position = () => number("t") ?? number("q") ?? facts.tokens.length - 1;
  // The token that the strip marks: the pinned one, or on the State page the one whose state is shown.
  const shownToken = () => (location.pathname === "/state" && number("t") !== null ? number("t") : query());
  const encode = (text) => encodeURIComponent(text).replace(/%2C/g, ",");

  // changes: {key: value}; null removes a key. Steps that come in long series (arrow keys, play) replace the last history
  // entry, so that the back button leads to the last deliberate choice.
  function change(changes, options) {
    const { replace = false, page = null } = options || {};
    const next = params();
    if (facts.run && !next.get("run")) next.set("run", facts.run);
    if ("run" in changes && changes.run !== next.get("run")) PER_RUN.forEach((key) => next.delete(key));
    const another = (key, otherwise) => key in changes && String(changes[key] ?? "") !== (next.get(key) || otherwise);
    if (another("layer", "0") || another("slot", "")) PER_STATE.forEach((key) => next.delete(key));
    if ("b" in changes && changes.b !== next.get("b")) PER_PAIR.forEach((key) => next.delete(key));
    for (const [key, value] of Object.entries(changes)) {
      if (value === null || value === undefined || value === "") next.delete(key);
      else next.set(key, String(value));
    }
    next.delete("v");
    const pairs = [...next].sort((a, b) => (a[0] < b[0] ? -1 : 1)).map(([key, value]) => `${key}=${encode(value)}`);
    const url = `${page ?? location.pathname}?${["v=1", ...pairs].join("&")}`;
    if (url === location.pathname + location.search) return;
    const elsewhere = page !== null && page !== location.pathname;
    history[replace ? "replaceState" : "pushState"]({}, "", url);
    window.dispatchEvent(new PopStateEvent("popstate"));
    if (elsewhere) window.scrollTo(0, 0);
    announceView();
  }

  const announceView = () => document.dispatchEvent(new CustomEvent("wb:view"));
  window.addEventListener("popstate", announceView);

  // Hovering anything that stands for a token marks that token in every strip and figure.
  let hovered = { query: null, key: null };
  function hover(next) {
    if (next.query === hovered.query && next.key === hovered.key) return;
    hovered = next;
    document.dispatchEvent(new CustomEvent("wb:hover", { detail: hovered }));
  }

  function say(text) {
    const status = document.getElementById("status");
    if (status) status.textContent = text;
  }

  const GLYPHS = { " ": "·", "\n": "↵", "\t": "⇥", "\r": "␍" };
  // What a token looks like: [text, whether it is a stand-in for something invisible].
  function tokenLook(text) {
    if (text === "") return ["∅", true];
    if (GLYPHS[text]) return [GLYPHS[text], true];
    const escaped = (c) => GLYPHS[c] || `\\x${c.charCodeAt(0).toString(16).padStart(2, "0")}`;
    return [text.replace(/[\u0000-\u001f\u007f-\u00a0\u00ad]/g, escaped), false];
  }
  const describeToken = (index) =>
    index === null || facts.tokens[index] === undefined ? "" : `${index} ‘${tokenLook(facts.tokens[index])[0]}’`;

  return { facts, params, number, query, position, shownToken, change, hover, hovered: () => hovered, say, tokenLook, describeToken, announceView };
})();

// Clientside callbacks. They are here, not inline, so that the page needs no inline script.
window.dash_clientside = Object.assign({}, window.dash_clientside, {
  workbench: (function () {
    "use strict";
    const none = () => window.dash_clientside.no_update;
    const triggered = () => window.dash_clientside.callback_context.triggered_id;
    // A picture is never finer than the screen: a browser that shrinks it drops single cells.
    const pixels = () => (innerWidth < 760 ? 256 : 512);

    // The slice's part of the view, or no_update when that part is as before.
    function cut(slice, view, scheme) {
      const part = { scheme, pixels: pixels() };
      for (const key of slice.depends) part[key] = view[key];
      return JSON.stringify(part) === JSON.stringify(slice.view) ? none() : { depends: slice.depends, view: part };
    }

    return {
      // The server resolved the view: write it into the address bar in its canonical form, and give every panel its part.
      distribute: function (view, scheme, slices) {
        if (!view) return slices.map(none);
        const address = location.pathname + location.search;
        if (view.url !== address && view.asked === address) {
          history.replaceState({}, "", view.url);
          workbench.announceView();
        }
        return slices.map((slice) => cut(slice, view, scheme));
      },
      inspector: (view, slice) => (view ? cut(slice, view, null) : none()),
      facts: function (facts) {
        if (facts) {
          Object.assign(workbench.facts, facts);
          workbench.announceView();
        }
        return "";
      },
      // A control (list, slider) was moved by the reader.
      control: function (values, ids) {
        const moved = triggered();
        const at = moved ? ids.findIndex((id) => id.key === moved.key) : -1;
        if (at >= 0 && values[at] !== null && values[at] !== undefined) {
          const current = moved.key === "t" ? workbench.position() : workbench.params().get(moved.key) ?? moved.default;
          if (String(values[at]) !== String(current)) {
            const value = String(values[at]) === moved.default ? null : values[at];
            workbench.change({ [moved.key]: value }, { replace: moved.key === "t" });
          }
        }
        return none();
      },
      // The view changed elsewhere (back button, keyboard): the controls follow.
      follow: function (view, ids, values) {
        if (!view) return ids.map(none);
        return ids.map((id, at) => {
          const value = view.controls[id.key];
          if (value === undefined || String(value) === String(values[at])) return none();
          return typeof values[at] === "number" ? Number(value) : value;
        });
      },
      navigation: function (view, ids) {
        const part = view ? `?${view.url.split("?")[1]}` : location.search;
        return ids.map((id) => id.path + part);
      },
      current: (view, ids) => ids.map((id) => (view && view.page === id.page ? "page" : "false")),
      go: function (target) {
        // `change` are keys of the address; a target that names only a run opens that run.
        if (target && (target.change || target.run)) workbench.change(target.change || { run: target.run }, { page: target.page });
        return none();
      },
      burger: (opened, navbar) => ({ ...navbar, collapsed: { mobile: !opened } }),
      // These pages need the room of the inspector, and have nothing to inspect.
      aside: (view, aside) => ({ ...aside, collapsed: { mobile: true, desktop: Boolean(view) && ["runs", "cases", "probes", "features", "segments"].includes(view.page) } }),
      close_burger: () => false,
      text_size: (text) => (text ? `${text.length.toLocaleString("en")} characters` : ""),
      export_png: () => workbench.exportFigure("png"),
      export_svg: () => workbench.exportFigure("svg"),
      export_csv: () => download(`/export/${triggered().panel}.csv${location.search}`),
      export_pixels: () => download(`/export/${triggered().panel}.png${location.search}&scheme=${scheme()}`),
      export_run: function (clicks, rows) {
        return rows && rows.length ? download(`/export/run/${encodeURIComponent(rows[0].id)}.zip`) : none();
      },
    };

    function scheme() {
      return document.documentElement.getAttribute("data-mantine-color-scheme");
    }
    function download(address) {
      const anchor = document.createElement("a");
      anchor.href = address;
      anchor.download = "";
      anchor.click();
      return none();
    }
  })(),
});
