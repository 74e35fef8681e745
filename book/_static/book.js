// What pages do beyond the theme.

// Paper is white: print in the light scheme.
{
  const page = document.documentElement.dataset;
  let theme;
  addEventListener("beforeprint", () => { theme = page.theme; page.theme = "light"; });
  addEventListener("afterprint", () => { page.theme = theme; });
}

// The verdicts table: sort by any column, filter by words and by verdict, and find the row that the address names.
// Without this script it is a plain table with every row.

document.addEventListener("DOMContentLoaded", () => {
  const table = document.querySelector("table.verdicts");
  if (!table) return;

  const body = table.tBodies[0];
  const order = [
    "holds", "holds-with-condition", "holds-corrected", "refuted", "ill-defined",
    "reproduced", "partly-reproduced", "not-reproduced", "not-run", "open",
  ];
  const rows = [...body.rows].map((row, place) => ({
    row,
    place,
    badge: row.querySelector(".badge"),
    verdict: [...row.classList].find((name) => name.startsWith("verdict-")).slice("verdict-".length),
    cells: [...row.cells].map((cell) => cell.textContent.trim()),
    text: row.textContent.toLowerCase(), // read before MathJax replaces the formulas
  }));
  const make = (tag, attributes, ...children) => {
    const element = Object.assign(document.createElement(tag), attributes);
    element.append(...children);
    return element;
  };

  // Narrow screens show rows as blocks, which takes the table's meaning from a screen reader unless it is spelt out.
  const role = (elements, name) => [...elements].forEach((element) => element.setAttribute("role", name));
  role([table], "table");
  role([table.tHead, body], "rowgroup");
  role(table.rows, "row");
  role(table.tHead.rows[0].cells, "columnheader");
  rows.forEach(({ row }) => role(row.cells, "cell"));

  // Filters
  const words = make("input", { type: "search", placeholder: "thm-1, §4.1, softmax …" });
  const status = make("p", { className: "verdict-count" });
  status.setAttribute("role", "status");
  const counts = new Map();
  rows.forEach(({ verdict }) => counts.set(verdict, (counts.get(verdict) ?? 0) + 1));
  const found = [...counts.keys()].sort((a, b) => order.indexOf(a) - order.indexOf(b));
  const chips = new Map(found.map((verdict) => {
    const badge = rows.find((entry) => entry.verdict === verdict).badge.cloneNode(true);
    const chip = make("button", { type: "button", className: "verdict-chip" }, badge, ` ${counts.get(verdict)}`);
    chip.setAttribute("aria-pressed", "false");
    chip.addEventListener("click", () => {
      chip.setAttribute("aria-pressed", String(chip.getAttribute("aria-pressed") === "false"));
      filter();
    });
    return [verdict, chip];
  }));

  function filter() {
    const terms = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = found.filter((verdict) => chips.get(verdict).getAttribute("aria-pressed") === "true");
    let shown = 0;
    for (const { row, text, verdict } of rows) {
      const match = terms.every((term) => text.includes(term)) && (!chosen.length || chosen.includes(verdict));
      row.hidden = !match;
      shown += match;
    }
    status.textContent = shown ? `${shown} of ${rows.length} statements` : "No statement matches.";
  }

  words.addEventListener("input", filter);
  const group = make("div", { className: "verdict-chips" }, ...chips.values());
  group.setAttribute("role", "group");
  group.setAttribute("aria-label", "Show only these verdicts");
  const label = make("label", {}, "Filter ", words);
  const form = make("div", { className: "verdict-filters" }, label, group, status);
  (table.closest(".pst-scrollable-table-container") ?? table).before(form);
  chips.get(new URLSearchParams(location.search).get("verdict"))?.setAttribute("aria-pressed", "true");
  filter();

  // Sorting: up, down, and back to the order of the index.
  const { compare } = new Intl.Collator("en", { numeric: true });
  const headers = [...table.tHead.rows[0].cells];
  const keys = headers.map((header) => header.textContent.trim());
  headers.forEach((header, column) => {
    const button = make("button", { type: "button" }, keys[column]);
    header.replaceChildren(button);
    header.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const next = { none: "ascending", ascending: "descending", descending: "none" }[header.getAttribute("aria-sort")];
      headers.forEach((other) => other.setAttribute("aria-sort", other === header ? next : "none"));
      const by = keys[column] === "Verdict"
        ? (a, b) => order.indexOf(a.verdict) - order.indexOf(b.verdict)
        : (a, b) => compare(a.cells[column], b.cells[column]);
      const sign = { none: 0, ascending: 1, descending: -1 }[next];
      const sorted = [...rows].sort((a, b) => sign * by(a, b) || a.place - b.place);
      body.append(...sorted.map(({ row }) => row));
    });
  });

  // verdicts.html#eq-2: the row must be there, and stay in sight when formulas change its place.
  async function reveal() {
    const target = rows.find(({ row }) => row.id && `#${row.id}` === location.hash);
    if (!target) return;
    if (target.row.hidden) {
      words.value = "";
      chips.forEach((chip) => chip.setAttribute("aria-pressed", "false"));
      filter();
    }
    await window.MathJax?.startup?.promise;
    target.row.scrollIntoView({ block: "center" });
  }
  addEventListener("hashchange", reveal);
  addEventListener("load", reveal);
});
