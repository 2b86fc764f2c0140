// Runs in the head, before anything is painted: the page never flashes in the wrong scheme. The cookie tells the server
// which scheme the first figures are drawn in.
(function () {
  const found = /(?:^|; )workbench_scheme=(light|dark)/.exec(document.cookie);
  const preferred = window.matchMedia && matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const scheme = found ? found[1] : preferred;
  document.documentElement.setAttribute("data-mantine-color-scheme", scheme);
  document.cookie = `workbench_scheme=${scheme}; path=/; max-age=31536000; SameSite=Strict`;
})();
