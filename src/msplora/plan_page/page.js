// Draws the pyramid, and counts anew whenever a slider moves. Without it the tables show the plan as it was made.
const plan = JSON.parse(document.getElementById("plan").textContent);
const setting = {
  levels: plan.levels.map(({ rank, groups }) => ({ on: true, rank, groups })),
};
const asMade = JSON.stringify(setting);
const whole = (number) => number.toLocaleString("en-US");
// As Python rounds: a half to the even digit.
const share = (part, all) => {
  const tenths = (1000 * part) / all;
  const down = Math.floor(tenths);
  const up = tenths - down > 0.5 || (tenths - down === 0.5 && down % 2 === 1);
  return `${((down + up) / 10).toFixed(1)}%`;
};
const bytes = (count) => {
  const units = ["bytes", "KiB", "MiB", "GiB"];
  let unit = 0;
  for (; count >= 1024 && unit < units.length - 1; unit++) count /= 1024;
  return `${unit && count < 100 ? count.toFixed(1) : Math.round(count)} ${units[unit]}`;
};
const at = (id) => document.getElementById(id);
const put = (id, text) => (at(id).textContent = text);
const make = (tag, className, text = "") => {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
};

// "0–3, 7": the numbers of blocks in a row.
function ranges(numbers) {
  const runs = [];
  for (const number of numbers) {
    const last = runs[runs.length - 1];
    if (last && number === last[1] + 1) last[1] = number;
    else runs.push([number, number]);
  }
  return runs;
}
const spelled = (numbers) => ranges(numbers).map(([a, b]) => (a === b ? `${a}` : `${a}–${b}`)).join(", ");

function scale(level, kind) {
  const rank = Pyramid.rank(kind, setting, level);
  const alpha = (kind.alphas ?? plan.levels.map(({ alpha }) => alpha))[level];
  return +(alpha / (plan.levels[level].rslora ? Math.sqrt(rank) : rank)).toPrecision(4);
}

function describePair(kind, level, group, depths) {
  const rank = Pyramid.rank(kind, setting, level);
  const numbers = Pyramid.parameters(kind, rank);
  const blocks = depths.map((depth) => kind.blocks[depth]);
  const who = kind.inBlocks
    ? `${depths.length === 1 ? "layer" : `${depths.length} layers:`} ${spelled(blocks)}`
    : kind.sites[depths[0]];
  return (
    `${plan.levels[level].name}/${group}/${kind.name}. Rank ${rank}, scale ${scale(level, kind)}. ` +
    `Used by ${who}. ${whole(numbers)} parameters, ${bytes(4 * numbers)} in float32.`
  );
}

function describeSite(kind, depth) {
  const used = plan.levels
    .map(({ name }, level) => [name, level])
    .filter(([, level]) => setting.levels[level].on)
    .map(([name, level]) => {
      const group = Pyramid.groupOf(depth, setting.levels[level].groups, kind.blocks.length);
      return `${name}/${group} (rank ${Pyramid.rank(kind, setting, level)})`;
    });
  return `${kind.sites[depth]}, ${kind.shape}. Uses ${used.join(", ")}.`;
}

// One kind: a row of bars per level, a bar per pair, above a row of its layers.
function draw(kind, place) {
  const grid = at(`grid-${place}`);
  const first = Math.min(...plan.kinds.filter(({ stack }) => stack === kind.stack).flatMap(({ blocks }) => blocks));
  const last = Math.max(...plan.kinds.filter(({ stack }) => stack === kind.stack).flatMap(({ blocks }) => blocks));
  const columns = last - first + 1;
  const most = Math.max(...setting.levels.map(({ on }, level) => (on ? Pyramid.rank(kind, setting, level) : 0)));
  grid.style.setProperty("--columns", columns);
  grid.replaceChildren();
  grid.ariaColCount = columns + 1;

  const row = (name, className) => {
    const made = make("div", `row ${className}`);
    made.setAttribute("role", "row");
    const header = make("div", "name", name);
    header.setAttribute("role", "rowheader");
    made.append(header);
    grid.append(made);
    return made;
  };
  const cell = (row, blocks, label, depths) => {
    const made = make("div", "cell");
    made.setAttribute("role", "gridcell");
    made.setAttribute("aria-label", label);
    made.tabIndex = -1;
    made.depths = depths;
    const from = blocks[0] - first + 1;
    made.style.gridColumn = `${from + 1} / span ${blocks[blocks.length - 1] - blocks[0] + 1}`;
    made.ariaColIndex = from + 1;
    made.ariaColSpan = blocks[blocks.length - 1] - blocks[0] + 1;
    made.style.gridTemplateColumns = `repeat(${blocks[blocks.length - 1] - blocks[0] + 1}, minmax(0, 1fr))`;
    for (const [a, b] of ranges(blocks)) {
      const part = make("i", "");
      part.style.gridColumn = `${a - blocks[0] + 1} / span ${b - a + 1}`;
      made.append(part);
    }
    row.append(made);
    return made;
  };

  plan.levels.forEach(({ name }, level) => {
    if (!setting.levels[level].on) return;
    const rank = Pyramid.rank(kind, setting, level);
    const bars = row(`${name} · ${rank}`, `level of-${level % 5}`);
    bars.style.setProperty("--tall", Math.max(0.5, (2.6 * rank) / most));
    Pyramid.pairs(kind, setting, level).forEach((depths, group) => {
      const blocks = depths.map((depth) => kind.blocks[depth]);
      cell(bars, blocks, describePair(kind, level, group, depths), depths);
    });
  });
  const sites = row("layer", "sites");
  const every = Math.ceil(columns / 16);
  kind.blocks.forEach((block, depth) => {
    const made = cell(sites, [block], describeSite(kind, depth), [depth]);
    if (kind.inBlocks && (block - first) % every === 0) made.append(make("span", "number", block));
  });
  grid.querySelector(".cell").tabIndex = 0;
}

// Light up what shares: a pair's layers, or a layer's pairs.
function light(chosen) {
  for (const grid of document.querySelectorAll(".grid")) {
    const mine = chosen && grid.contains(chosen);
    grid.classList.toggle("lit", Boolean(mine));
    if (!mine) continue;
    const isSite = chosen.parentElement.classList.contains("sites");
    const level = [...chosen.parentElement.classList].find((name) => name.startsWith("of-"));
    grid.style.setProperty("--chosen", `var(--c${isSite ? 0 : level.slice(3)})`);
    for (const its of grid.querySelectorAll(".cell")) {
      const shares = its.depths.some((depth) => chosen.depths.includes(depth));
      const counts = isSite ? its === chosen || !its.parentElement.classList.contains("sites") : its.parentElement.classList.contains("sites");
      its.classList.toggle("on", its === chosen || (shares && counts));
    }
  }
  put("chosen", chosen ? chosen.getAttribute("aria-label") : at("chosen").dataset.empty);
}

// Arrow keys go along a row and between rows, to the nearest bar.
function move(event) {
  const from = event.target.closest(".cell");
  if (!from || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const row = from.parentElement;
  const cells = [...row.querySelectorAll(".cell")];
  const rows = [...row.parentElement.children];
  let to;
  if (event.key === "ArrowRight") to = cells[cells.indexOf(from) + 1];
  else if (event.key === "ArrowLeft") to = cells[cells.indexOf(from) - 1];
  else if (event.key === "Home") to = cells[0];
  else if (event.key === "End") to = cells[cells.length - 1];
  else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    const next = rows[rows.indexOf(row) + (event.key === "ArrowDown" ? 1 : -1)];
    to = next && [...next.querySelectorAll(".cell")].find((its) => its.depths.includes(from.depths[0]));
  } else return;
  event.preventDefault();
  if (!to) return;
  for (const its of row.parentElement.querySelectorAll(".cell")) its.tabIndex = -1;
  to.tabIndex = 0;
  to.focus();
}

function show() {
  const found = Pyramid.count(plan, setting);
  put("parameters", whole(found.parameters));
  put("lora", whole(found.lora));
  put("lora-rank", setting.levels.find(({ on }) => on).rank);
  put("share", share(found.parameters, found.lora));
  put("bytes", `${bytes(4 * found.parameters)} in float32, ${bytes(2 * found.parameters)} in bfloat16`);
  put("lora-bytes", `${bytes(4 * found.lora)} in float32, ${bytes(2 * found.lora)} in bfloat16`);
  const most = Math.max(found.parameters, found.lora);
  at("bar").style.setProperty("--part", found.parameters / most);
  at("lora-bar").style.setProperty("--part", found.lora / most);
  const on = setting.levels.filter((level) => level.on).length;
  setting.levels.forEach((level, place) => {
    const { pairs, parameters } = found.levels[place];
    put(`level-${place}-pairs`, whole(pairs));
    put(`level-${place}-parameters`, whole(parameters));
    put(`level-${place}-rank`, level.rank);
    const groups = level.groups || plan.mostLayers;
    const said = level.groups === 0 ? "per layer" : level.groups === 1 ? "all layers" : `${level.groups} groups`;
    put(`level-${place}-groups`, said);
    const sliders = [[at(`rank-${place}`), level.rank, `rank ${level.rank}`], [at(`groups-${place}`), groups, said]];
    for (const [slider, value, text] of sliders) {
      slider.value = value;
      slider.setAttribute("aria-valuetext", text);
    }
    at(`on-${place}`).checked = level.on;
    at(`on-${place}`).disabled = level.on && on === 1;
    at(`level-${place}`).classList.toggle("off", !level.on);
  });
  plan.kinds.forEach((kind, place) => {
    const { parameters, lora } = found.kinds[place];
    const ranks = Pyramid.ranks(kind, setting).filter((_, its) => setting.levels[its].on);
    put(`kind-${place}-ranks`, ranks.join("+"));
    put(`kind-${place}-parameters`, whole(parameters));
    put(`kind-${place}-lora`, whole(lora));
    put(`kind-${place}-share`, share(parameters, lora));
    if (kind.drawnAt === place) draw(kind, place);
  });
  const refused = plan.kinds.map(refusal).filter(Boolean).join(" ");
  at("refused").hidden = !refused;
  put("refused", refused);
  at("notes-of").hidden = JSON.stringify(setting) === asMade;
  spell();
  put("said", `${whole(found.parameters)} parameters, ${share(found.parameters, found.lora)} of LoRA's ${whole(found.lora)}. ${refused}`.trim());
}

// Why msplora would not take the setting at a kind; empty where it does.
function refusal(kind) {
  const ranks = Pyramid.ranks(kind, setting).filter((_, level) => setting.levels[level].on);
  if (ranks.includes(0)) return `${kind.name}: its own rank of ${kind.rank} gives it the ranks ${ranks.join(", ")}; each must be at least 1, and msplora refuses this.`;
  if (ranks.some((rank) => rank % kind.splits)) return `${kind.name}: its ${kind.splits} groups of channels must divide every rank; msplora refuses this.`;
  return "";
}

// The setting as a config. A pattern's alpha stands for the first level's that is on: which that is may have changed.
function spell() {
  const used = setting.levels.map((level, place) => ({ ...plan.levels[place], ...level })).filter(({ on }) => on);
  const list = (name) => used.map((level) => level[name]).join(", ");
  const first = setting.levels.findIndex(({ on }) => on);
  const own = plan.kinds.filter(({ alphas }) => alphas).map(({ pattern, alphas }) => `        ${JSON.stringify(pattern)}: ${alphas[first]},`);
  const lines = [
    `    levels=[${used.map(({ name }) => `"${name}"`).join(", ")}],`,
    `    ranks=[${list("rank")}],`,
    `    groups=[${list("groups")}],`,
    `    alphas=[${list("alpha")}],`,
    ...(own.length ? ["    alpha_pattern={", ...own, "    },"] : []),
    ...(plan.levels[0].rslora ? ["    use_rslora=True,"] : []),
  ];
  put("config", ["msplora.MSPLoraConfig(", ...lines, "    …", ")"].join("\n"));
}

plan.levels.forEach((_, place) => {
  at(`rank-${place}`).addEventListener("input", (event) => {
    const rank = Number(event.target.value);
    setting.levels[place].rank = rank;
    if (place === 0) Pyramid.ranksFrom(plan, rank).forEach((rank, its) => (setting.levels[its].rank = rank));
    show();
  });
  at(`groups-${place}`).addEventListener("input", (event) => {
    const groups = Number(event.target.value);
    setting.levels[place].groups = groups === plan.mostLayers ? 0 : groups;
    show();
  });
  at(`on-${place}`).addEventListener("change", (event) => {
    setting.levels[place].on = event.target.checked;
    show();
  });
});
at("reset").addEventListener("click", () => {
  Object.assign(setting, JSON.parse(asMade));
  show();
});
document.addEventListener("keydown", move);
document.addEventListener("focusin", (event) => light(event.target.closest(".cell")));
document.addEventListener("pointerover", (event) => {
  const over = event.target.closest(".cell");
  const focused = document.activeElement.closest(".cell");
  light(over || focused);
});
at("controls").hidden = false;
for (const its of document.querySelectorAll(".drawn")) its.hidden = false;
show();
