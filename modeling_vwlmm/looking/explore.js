// One model's view of an image: a grid over it, and what is said of the patch under the pointer. `props.value` is what
// `view_of` of explore.py makes. Texts are only ever set as text: a vocabulary may hold any.
const make = (name, text = "", parent = null) => {
  const [tag, ...classes] = name.split(".");
  const made = document.createElement(tag);
  made.className = classes.join(" ");
  made.textContent = text;
  if (parent) parent.append(made);
  return made;
};
const root = element.querySelector(".vw-view");
let chosen = { x: 0.5, y: 0.5 };
let pinned = false;

const distribution = (title, pairs, parent) => {
  const column = make("div.vw-words", "", parent);
  make("div.vw-title", title, column);
  if (!pairs) make("div", "nothing precedes this patch", column);
  for (const [word, probability] of pairs || []) {
    const row = make("div.vw-word", "", column);
    row.style.setProperty("--share", `${100 * probability}%`);
    make("span", word, row);
    make("span", probability.toFixed(3), row);
  }
};

const read = () => {
  const view = props.value;
  if (!view) return;
  const row = Math.min(Math.floor(chosen.y * view.rows), view.rows - 1);
  const column = Math.min(Math.floor(chosen.x * view.columns), view.columns - 1);
  const index = row * view.columns + column;
  const cells = root.querySelectorAll(".vw-cell");
  cells.forEach((cell, i) => {
    cell.classList.toggle("vw-chosen", i === index);
    cell.classList.toggle("vw-pinned", i === index && pinned);
  });
  const patch = view.patches[index];
  const said = root.querySelector(".vw-said");
  said.replaceChildren();
  const kl = patch.kl === null ? "" : `, KL(w ‖ p) ${patch.kl.toFixed(2)} nats`;
  const heat = view.heat ? `, “${view.heat.word}” ${view.heat.values[index].toFixed(3)}` : "";
  make("div.vw-where", `row ${row + 1}, column ${column + 1}${kl}${heat}`, said);
  const both = make("div.vw-both", "", said);
  distribution("visual word w", patch.words, both);
  distribution("the LLM expected p", patch.expected, both);
};

const draw = () => {
  const view = props.value;
  root.replaceChildren();
  if (!view) {
    make("div", "Drop an image to begin.", root);
    return;
  }
  const picture = make("div.vw-picture", "", root);
  const image = make("img", "", picture);
  image.src = view.image;
  image.alt = "the image as the model sees it";
  const grid = make("div.vw-grid", "", picture);
  grid.style.gridTemplateColumns = `repeat(${view.columns}, 1fr)`;
  grid.style.gridTemplateRows = `repeat(${view.rows}, 1fr)`;
  const most = view.heat ? Math.max(...view.heat.values, 1e-12) : 1;
  view.patches.forEach((patch, i) => {
    const cell = make("div.vw-cell", "", grid);
    if (view.columns <= 8 && !view.heat) make("span", patch.words[0][0], cell);
    if (view.heat) cell.style.background = `rgba(255, 80, 0, ${(0.9 * view.heat.values[i]) / most})`;
    const choose = () => {
      const x = ((i % view.columns) + 0.5) / view.columns;
      const y = (Math.floor(i / view.columns) + 0.5) / view.rows;
      window.dispatchEvent(new CustomEvent("vw-patch", { detail: { x, y, pinned } }));
    };
    cell.addEventListener("mouseenter", () => pinned || choose());
    cell.addEventListener("click", () => {
      pinned = !pinned;
      choose();
    });
  });
  if (view.heat) make("div.vw-heat", `“${view.heat.word}”: up to ${most.toFixed(3)}`, picture);
  make("div.vw-said", "", root);
  read();
};

// All views of a page show the same place
window.addEventListener("vw-patch", ({ detail }) => {
  chosen = { x: detail.x, y: detail.y };
  pinned = detail.pinned;
  read();
});
watch("value", draw);
draw();
