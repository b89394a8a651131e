// Sorting, filtering and reading of points. The page is complete without it.
"use strict";
(() => {
  const number = (cell) => {
    const text = cell.dataset.value ?? cell.textContent.replace(/,/g, "");
    return /^\s*[-+]?(\d|\.\d)/.test(text) ? parseFloat(text) : NaN;
  };

  // Empty cells and words stand behind numbers, in either direction.
  const compare = (one, other, sign) => {
    const [a, b] = [number(one), number(other)];
    if (Number.isNaN(a) !== Number.isNaN(b)) return Number.isNaN(a) ? 1 : -1;
    if (!Number.isNaN(a) && a !== b) return sign * (a - b);
    return sign * one.textContent.localeCompare(other.textContent, "en", { numeric: true });
  };

  const sort = (header) => {
    const table = header.closest("table");
    const body = table.tBodies[0];
    const place = header.cellIndex;
    const ascending = header.getAttribute("aria-sort") !== "ascending";
    const rows = [...body.rows];
    rows.sort((a, b) => compare(a.cells[place], b.cells[place], ascending ? 1 : -1));
    body.append(...rows);
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  };

  for (const table of document.querySelectorAll("table:not(.cells)")) {
    if (!table.tBodies[0] || table.tBodies[0].rows.length < 2) continue;
    for (const header of table.tHead.querySelectorAll("th")) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...header.childNodes);
      header.append(button);
      button.addEventListener("click", () => sort(header));
    }
  }

  // Boxes that do not scroll are no stops of the tab key.
  const boxes = document.querySelectorAll(".scroll");
  const stops = () => {
    const wide = [...boxes].map((box) => box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight);
    boxes.forEach((box, place) => (wide[place] ? box.setAttribute("tabindex", "0") : box.removeAttribute("tabindex")));
  };
  stops();
  addEventListener("resize", stops);
  for (const details of document.querySelectorAll("details")) details.addEventListener("toggle", stops);
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => (each.open = true)));

  const filter = document.querySelector("#filter");
  if (filter) {
    const rows = [...document.querySelector("#trials-table").tBodies[0].rows];
    const texts = rows.map((row) => [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase());
    filter.closest(".filter").hidden = false;
    filter.addEventListener("input", () => {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      let left = 0;
      rows.forEach((row, place) => {
        row.hidden = !words.every((word) => texts[place].includes(word));
        left += !row.hidden;
      });
      document.querySelector("output[for=filter]").textContent = `${left} of ${rows.length} rows`;
    });
  }

  for (const group of document.querySelectorAll(".series")) {
    group.hidden = false;
    const parts = [...group.closest("figure").querySelectorAll("[data-part]")];
    const shown = () => {
      const off = [...group.querySelectorAll("[aria-pressed=false]")].map((button) => button.dataset.match);
      const hides = (part, match) => (match.startsWith("-") ? part.endsWith(match) : part.startsWith(match));
      for (const part of parts) part.classList.toggle("off", off.some((match) => hides(part.dataset.part, match)));
    };
    for (const button of group.querySelectorAll("button")) {
      button.addEventListener("click", () => {
        button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") === "true" ? "false" : "true");
        shown();
      });
    }
  }
  for (const hint of document.querySelectorAll(".script")) hint.hidden = false;

  const tip = document.querySelector("#tip");
  let current = null;
  const put = () => {
    if (!current) return;
    const place = current.getBoundingClientRect();
    const left = place.left + place.width / 2 - tip.offsetWidth / 2;
    tip.style.left = `${Math.max(4, Math.min(left, document.documentElement.clientWidth - tip.offsetWidth - 4))}px`;
    const above = place.top - tip.offsetHeight - 8;
    tip.style.top = `${above > 4 ? above : place.bottom + 8}px`;
  };
  const show = (mark) => {
    if (mark === current) return;
    current?.classList.remove("at");
    current = mark;
    tip.hidden = !mark;
    if (!mark) return;
    mark.classList.add("at");
    tip.textContent = mark.dataset.tip;
    put();
  };
  const hide = () => show(null);
  addEventListener("scroll", put, { capture: true, passive: true });
  addEventListener("keydown", (event) => event.key === "Escape" && hide());

  // The nearest mark of a plot, for points are small.
  for (const plot of document.querySelectorAll(".plot")) {
    const marks = () => [...plot.querySelectorAll("[data-tip]")].filter((mark) => mark.getBoundingClientRect().width);
    let places = [];
    plot.addEventListener("pointerenter", () => {
      places = marks().map((mark) => {
        const { left, top, width, height } = mark.getBoundingClientRect();
        return [left + width / 2 + scrollX, top + height / 2 + scrollY, mark];
      });
    });
    plot.addEventListener("pointermove", (event) => {
      let [best, distance] = [null, 24 ** 2];
      for (const [x, y, mark] of places) {
        const squared = (x - event.pageX) ** 2 + (y - event.pageY) ** 2;
        // Of marks in one place the one on top.
        if (squared <= distance) [best, distance] = [mark, squared];
      }
      show(best);
    });
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const all = marks();
      const from = all.indexOf(current);
      if (all.length) show(all[from < 0 ? (step > 0 ? 0 : all.length - 1) : (from + step + all.length) % all.length]);
    });
  }
  for (const cells of document.querySelectorAll(".cells")) {
    cells.addEventListener("pointerover", (event) => show(event.target.closest("[data-tip]")));
    cells.addEventListener("pointerleave", hide);
  }
})();
