"use strict";
// Draws the page from the block of JSON. Data goes in as text nodes and as numbers, and
// never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";

  // -- small helpers -----------------------------------------------------------

  function el(tag, properties = {}, ...children) {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  }

  function svg(tag, attributes, ...children) {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) {
      node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  }

  const section = (name) => document.getElementById(name);
  const note = (text) => el("p", { className: "note" }, text);
  const isNumber = (value) => typeof value === "number";

  function fmt(value) {
    if (!isNumber(value)) return "–";
    const size = Math.abs(value);
    if (size >= 1e6 || (size < 1e-3 && size > 0)) return value.toExponential(2);
    if (Number.isInteger(value)) return value.toLocaleString("en");
    if (size >= 1000) return value.toLocaleString("en", { maximumFractionDigits: 1 });
    return String(Number(value.toPrecision(4)));
  }

  const signed = (value) => (isNumber(value) && value > 0 ? "+" : "") + fmt(value);

  // Control characters are shown by their pictures; lines and tabs stay.
  function visible(text) {
    return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f]/g, (c) =>
      c === "\u007f" ? "\u2421" : String.fromCharCode(0x2400 + c.charCodeAt(0)));
  }

  function labelled(text, control) {
    return el("label", {}, text, control);
  }

  function choose(options, chosen, change) {
    const select = el("select");
    for (const [value, text] of options) {
      select.append(el("option", { value: String(value) }, text));
    }
    select.value = String(chosen);
    select.addEventListener("change", () => change(select.value));
    return select;
  }

  // A box that may scroll, for a keyboard and a screen reader too.
  function scroller(className, label, ...children) {
    const box = el("div", { className, tabIndex: 0 }, ...children);
    box.setAttribute("role", className.startsWith("wide") ? "region" : "group");
    box.setAttribute("aria-label", label);
    return box;
  }

  function table(heads, rows) {
    const head = el("tr");
    for (const cell of heads) {
      const th = el("th", { scope: "col" }, ...[cell].flat());
      head.append(th);
    }
    const body = el("tbody");
    for (const [name, ...cells] of rows) {
      const row = el("tr", {}, el("th", { scope: "row" }, name));
      for (const [value, ends] of cells) {
        row.append(el("td", { className: "figure" }, `${value} `,
          el("small", {}, ends)));
      }
      body.append(row);
    }
    return el("table", {}, el("thead", {}, head), body);
  }

  // -- head ----------------------------------------------------------------------

  function head() {
    document.title = data.title;
    section("title").textContent = data.title;
    section("verdict").textContent = data.verdict;
    section("folder").textContent = data.folder;
    if (data.stage) {
      const rows = data.figures.map(([name, value]) => [name, [fmt(value), ""]]);
      section("result").append(rows.length
        ? scroller("wide", "Figures", table(["", "the stage's figure"], rows))
        : note("A stage's figures come with its manifest.json, when it is done."));
      return;
    }
    if (!data.table) {
      section("result").append(
        note("The table comes with summary.json, when a run of RL ends."));
      return;
    }
    const names = ["base", "half way", "final"];
    const heads = names.map((name, i) =>
      [name, el("small", {}, data.table.steps[i])]);
    const all = ["held out", ...heads, ["change", el("small", {}, "95 % over problems")]];
    section("result").append(
      scroller("wide", "Held-out problems", table(all, data.table.rows)));
  }

  // -- curves --------------------------------------------------------------------

  const BOX = { width: 420, height: 230, left: 52, right: 10, top: 10, bottom: 26 };

  function ticks(low, high, count) {
    const rough = (high - low) / count; // at most `count` steps
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
    const first = Math.ceil(low / step - 1e-9);
    return Array.from({ length: count + 1 }, (_, i) => (first + i) * step)
      .filter((value) => value <= high + step * 1e-9);
  }

  function extent(values) {
    let low = Infinity, high = -Infinity;
    for (const value of values) {
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
    return [low, high];
  }

  function scales(lines) {
    let [x0, x1] = extent(lines.flatMap((line) => line.x));
    let [y0, y1] = extent(lines.flatMap((line) => line.y));
    if (x0 === x1) { x0 -= 1; x1 += 1; }
    if (y0 >= 0 && y0 < 0.75 * y1) y0 = 0;
    const room = (y1 - y0) * 0.06 || Math.abs(y1) * 0.1 || 1;
    if (y0 !== 0) y0 -= room;
    y1 += room;
    const wide = BOX.width - BOX.left - BOX.right;
    const tall = BOX.height - BOX.top - BOX.bottom;
    return {
      x0, x1, y0, y1,
      x: (value) => BOX.left + ((value - x0) / (x1 - x0)) * wide,
      y: (value) => BOX.top + (1 - (value - y0) / (y1 - y0)) * tall,
    };
  }

  function axes(picture, at) {
    for (const value of ticks(at.y0, at.y1, 5)) {
      const y = at.y(value);
      picture.append(
        svg("line", { class: "grid", x1: BOX.left, x2: BOX.width - BOX.right,
          y1: y, y2: y }),
        svg("text", { x: BOX.left - 6, y: y + 4, "text-anchor": "end" },
          fmt(Number(value.toPrecision(6)))));
    }
    for (const value of ticks(at.x0, at.x1, 6)) {
      picture.append(svg("text", { x: at.x(value), y: BOX.height - 8,
        "text-anchor": "middle" }, fmt(Number(value.toPrecision(9)))));
    }
  }

  function nearest(xs, x) {
    let best = 0;
    xs.forEach((value, i) => {
      if (Math.abs(value - x) < Math.abs(xs[best] - x)) best = i;
    });
    return best;
  }

  function draw(panel, figure) {
    const lines = figure.lines.map(([place, label]) =>
      ({ ...data.curves.series[place], label }));
    const at = scales(lines);
    const picture = svg("svg", { viewBox: `0 0 ${BOX.width} ${BOX.height}`,
      tabindex: 0, role: "img" });
    axes(picture, at);
    lines.forEach((line, i) => {
      const points = line.x.map((x, k) =>
        `${at.x(x).toFixed(1)},${at.y(line.y[k]).toFixed(1)}`);
      picture.append(svg("polyline", { class: `curve c${i % 5}`,
        points: points.join(" ") }));
      if (points.length <= 40) {
        line.x.forEach((x, k) => picture.append(svg("circle",
          { class: `dot c${i % 5}`, cx: at.x(x), cy: at.y(line.y[k]), r: 2.4 })));
      }
    });
    const cursor = svg("g", {});
    picture.append(cursor);
    const reading = el("div", { className: "reading" });
    reading.setAttribute("aria-live", "polite");
    const xs = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    let place = xs.length - 1;

    function read(pointed) {
      const x = xs[place];
      reading.replaceChildren(el("span", {}, "step ", el("b", {}, fmt(x))));
      const marks = pointed ? [svg("line", { class: "cursor", x1: at.x(x),
        x2: at.x(x), y1: BOX.top, y2: BOX.height - BOX.bottom })] : [];
      lines.forEach((line, i) => {
        const k = nearest(line.x, x);
        const there = line.x[k] === x ? "" : ` (at ${fmt(line.x[k])})`;
        reading.append(el("span", { className: `key c${i % 5}` }, `${line.label} `,
          el("b", {}, fmt(line.y[k])), there));
        if (pointed) {
          marks.push(svg("circle", { class: `dot c${i % 5}`, cx: at.x(line.x[k]),
            cy: at.y(line.y[k]), r: 4 }));
        }
      });
      cursor.replaceChildren(...marks);
    }

    picture.addEventListener("pointermove", (event) => {
      const frame = picture.getBoundingClientRect();
      const inside = ((event.clientX - frame.left) / frame.width) * BOX.width;
      const share = (inside - BOX.left) / (BOX.width - BOX.left - BOX.right);
      place = nearest(xs, at.x0 + share * (at.x1 - at.x0));
      read(true);
    });
    picture.addEventListener("pointerleave", () => {
      place = xs.length - 1;
      read(false);
    });
    picture.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -xs.length, End: xs.length };
      if (!(event.key in moves)) return;
      event.preventDefault();
      place = Math.min(Math.max(place + moves[event.key], 0), xs.length - 1);
      read(true);
    });
    picture.setAttribute("aria-label",
      `${figure.name} against steps; arrow keys move along the curve`);
    read(false);
    panel.classList.toggle("alone", lines.length === 1);
    panel.querySelector(".plot").replaceChildren(picture, reading);
  }

  function panel(first) {
    const figures = data.curves.figures;
    const select = el("select");
    const sets = [...new Set(figures.map((figure) => figure.set))];
    for (const set of sets) {
      const options = el("optgroup", { label: set ? `phase ${set}` : "figures" });
      figures.forEach((figure, i) => {
        if (figure.set === set) {
          options.append(el("option", { value: String(i) }, figure.name));
        }
      });
      select.append(options);
    }
    select.value = String(first);
    select.setAttribute("aria-label", "metric to plot");
    const box = el("div", { className: "panel" }, select,
      el("div", { className: "plot" }));
    select.addEventListener("change", () => draw(box, figures[Number(select.value)]));
    draw(box, figures[first]);
    return box;
  }

  function curves() {
    const figures = data.curves.figures;
    if (!figures.length) {
      section("curves").append(note("metrics.jsonl has no numbers."));
      return;
    }
    const named = figures.filter((figure) => figure.set === "").length;
    const shown = figures.slice(0, named || 6).slice(0, 6);
    section("curves").append(
      note("Each panel plots any metric: choose it by its heading. Point at a curve, or"
        + ` focus it and use the arrow keys, to read it. ${data.curves.note}`),
      el("div", { className: "panels" }, ...shown.map((_, i) => panel(i))));
  }

  // -- doctor --------------------------------------------------------------------

  function doctor() {
    const { rollouts, look, list } = data.doctor;
    const place = section("doctor");
    if (rollouts < look) {
      place.append(note(`${rollouts} rollouts: too few to judge; ${look} have to agree.`));
    } else if (!list.length) {
      place.append(el("p", { className: "said fine" },
        `Nothing to complain of in the last ${look} of ${fmt(rollouts)} rollouts.`));
    }
    for (const [name, text, isNote] of list) {
      place.append(el("p", { className: isNote ? "said just" : "said" },
        el("b", {}, isNote ? `${name} (a note, no fault)` : name), text));
    }
  }

  // -- groups --------------------------------------------------------------------

  const MORE = "0 135 120", LESS = "214 84 20", MUCH = "118 84 205";
  const tint = (rgb, strength) =>
    strength > 0 ? `rgb(${rgb} / ${(0.6 * Math.min(strength, 1)).toFixed(2)})` : "";
  const twoSided = (share) => tint(share > 0 ? MORE : LESS, Math.abs(share));
  const SIDES = { low: MORE, high: LESS, cap: MUCH };

  // name -> label, the largest size of what is shown, colour of a value, legend
  const QUANTITIES = {
    advantage: {
      label: "advantage", least: 1e-6, size: (v) => Math.abs(v),
      colour: (v, most) => twoSided(v / most),
      legend: (most) => [[-most, fmt(-most)], [-most / 2, ""], [0, "0"],
        [most / 2, ""], [most, `+${fmt(most)}`]],
    },
    logprob: {
      label: "log-probability", least: 5, size: () => 5,
      colour: (v, most) => tint(MUCH, -v / most),
      legend: (most) => [[0, "0 (certain)"], [-most / 2, ""],
        [-most, `${fmt(-most)} nats and less`]],
    },
    ratio: {
      label: "ratio to the sampler", least: 0.01,
      size: (v) => (v > 0 ? Math.abs(Math.log(v)) : 0),
      colour: (v, most) => twoSided(v > 0 ? Math.log(v) / most : -1),
      legend: (most) => [[Math.exp(-most), fmt(Math.exp(-most))], [1, "1"],
        [Math.exp(most), fmt(Math.exp(most))]],
    },
    kl: {
      label: "KL to the reference", least: 1e-6, size: (v) => Math.abs(v),
      colour: (v, most) => tint(MUCH, v / most),
      legend: (most) => [[0, "0"], [most / 2, ""], [most, `${fmt(most)} nats`]],
    },
    clipped: {
      label: "clipping", least: 1, size: () => 1,
      colour: (v) => (SIDES[v] ? tint(SIDES[v], 1) : ""),
      legend: () => [["low", "clipped low"], ["high", "clipped high"],
        ["cap", "at the cap"]],
    },
  };

  function groups() {
    const place = section("groups");
    const list = data.groups.list;
    if (!list.length) {
      place.append(note(`${data.groups.note} config.grpo.traced_groups says how many.`));
      return;
    }
    // The last group that something is learned from.
    const taught = list.map((group) => group.outputs.some((output) =>
      (output.advantage || []).some((value) => value)));
    let at = Math.max(taught.lastIndexOf(true), 0), by = "advantage";
    const cards = el("div", { className: "cards" });
    const task = el("div");
    const legend = el("div", { className: "legend" });
    const detail = el("div", { className: "detail" });
    detail.setAttribute("aria-live", "polite");
    const pick = choose([], "", (value) => { at = Number(value); show(); });
    const search = el("input", { type: "search", placeholder: "text of any of them" });
    const found = el("p", { className: "note" });
    found.setAttribute("aria-live", "polite");
    const words = list.map(({ problem, answers, outputs }) => [problem, ...answers,
      ...outputs.map((output) => output.tokens.join(""))].join("\n").toLowerCase());
    const rewards = list.map((group) =>
      extent(group.outputs.map((output) => output.reward).filter(isNumber)));
    const lengths = list.map((group) =>
      extent(group.outputs.map((output) => output.whole)));
    // Of places in the list, which is as the file has it.
    const orders = {
      step: (a, b) => a - b,
      spread: (a, b) => rewards[b][1] - rewards[b][0] - rewards[a][1] + rewards[a][0]
        || a - b,
      length: (a, b) => lengths[b][1] - lengths[a][1] || a - b,
    };
    let order = "step", shown = [];
    const has = (name) => list.some((group) =>
      group.outputs.some((output) => Array.isArray(output[name])));
    const colour = choose(Object.keys(QUANTITIES).filter(has).map((name) =>
      [name, QUANTITIES[name].label]), by, (value) => { by = value; paint(); });
    by = colour.value || by;
    const back = el("button", { type: "button" }, "← before");
    const on = el("button", { type: "button" }, "after →");
    const move = (places) => { at = shown[shown.indexOf(at) + places]; show(); };
    back.addEventListener("click", () => move(-1));
    on.addEventListener("click", () => move(1));

    function arrange() {
      const wanted = search.value.toLowerCase();
      shown = list.map((_, i) => i).filter((i) => words[i].includes(wanted))
        .sort(orders[order]);
      found.textContent = wanted ? `${shown.length} of ${list.length} groups.` : "";
      pick.replaceChildren(...shown.map((i) => el("option", { value: String(i) },
        `update ${fmt(list[i].step)}, group ${fmt(list[i].group)}`)));
      if (shown.length && !shown.includes(at)) at = shown[0];
      show();
    }

    function paint() {
      const quantity = QUANTITIES[by];
      let most = quantity.least;
      for (const output of list[at].outputs) {
        for (const value of output[by] || []) {
          if (isNumber(value)) most = Math.max(most, quantity.size(value));
        }
      }
      for (const token of cards.querySelectorAll(".token")) {
        const values = list[at].outputs[token.dataset.output][by] || [];
        const value = values[token.dataset.place];
        token.style.backgroundColor =
          value === null || value === undefined ? "" : quantity.colour(value, most);
      }
      legend.replaceChildren(...(by === "advantage" && !taught[at]
        ? ["Equal rewards: no advantage in this group. "] : []));
      const steps = by === "advantage" && !taught[at] ? [] : quantity.legend(most);
      for (const [value, text] of steps) {
        const swatch = el("span", { className: "swatch" });
        swatch.style.backgroundColor = quantity.colour(value, most);
        legend.append(swatch, el("span", {}, text));
      }
      legend.append(el("span", {}, "Underlined: clipped."));
    }

    function tell(token) {
      for (const old of cards.querySelectorAll(".chosen")) old.classList.remove("chosen");
      if (!token) {
        detail.replaceChildren("Point at a token, tap it, or move along an output with"
          + " the arrow keys.");
        return;
      }
      token.classList.add("chosen");
      const output = list[at].outputs[token.dataset.output];
      const i = Number(token.dataset.place);
      const of = (name) => (output[name] || [])[i];
      const items = [el("code", {}, JSON.stringify(output.tokens[i])),
        `token ${i + 1} of ${fmt(output.whole)}, sample ${fmt(output.sample)}`];
      const p = of("logprob");
      if (isNumber(p)) items.push(`log p ${fmt(p)} (p ${fmt(Math.exp(p))})`);
      if (isNumber(of("ratio"))) items.push(`ratio ${fmt(of("ratio"))}`);
      if (isNumber(of("advantage"))) items.push(`advantage ${signed(of("advantage"))}`);
      if (isNumber(of("kl"))) items.push(`KL ${fmt(of("kl"))}`);
      if (of("clipped")) items.push(`clipped: ${of("clipped")}`);
      detail.replaceChildren(...items.map((item) => el("span", {}, item)));
    }

    function card(output, index) {
      const header = el("header", {}, el("b", {}, `sample ${fmt(output.sample)}`));
      if (isNumber(output.reward)) {
        header.append(el("span", {}, "reward ", el("b", {}, fmt(output.reward))));
      }
      if (output.outcome) {
        const good = output.outcome === "correct" ? "good" : "bad";
        header.append(el("span", { className: `chip ${good}` }, output.outcome));
      }
      // PPO has one of each token, GRPO one of the whole output.
      const [least, most] = extent((output.advantage || []).filter(isNumber));
      const range = least < most ? `advantages ${signed(least)} to ${signed(most)}`
        : `advantage ${signed(least)}`;
      header.append(
        el("span", {}, Number.isFinite(least) ? range : "no loss"),
        el("span", {}, output.whole > output.tokens.length
          ? `first ${fmt(output.tokens.length)} of ${fmt(output.whole)} tokens`
          : `${fmt(output.whole)} tokens`));
      if (output.parts && output.parts.length) {
        header.append(el("span", { className: "parts" }, "before weights: "
          + output.parts.map(([name, value]) => `${name} ${fmt(value)}`).join(" · ")));
      }
      const text = scroller("text", `Tokens of sample ${fmt(output.sample)}`);
      output.tokens.forEach((token, i) => {
        const span = el("span", { className: "token", tabIndex: i ? -1 : 0 },
          visible(token) || "␀");
        if ((output.clipped || [])[i]) span.classList.add("is-clipped");
        span.dataset.output = index;
        span.dataset.place = i;
        text.append(span);
      });
      return el("article", { className: "card" }, header, text);
    }

    function show() {
      const group = list[at];
      pick.value = String(at);
      back.disabled = shown.indexOf(at) < 1;
      on.disabled = !shown.includes(at) || at === shown.at(-1);
      task.replaceChildren();
      if (group.problem) {
        task.append(scroller("problem", "Problem", visible(group.problem)));
      }
      if (group.answers.length) task.append(note(`answer ${group.answers.join(" or ")}`));
      if (group.whole > group.outputs.length) {
        task.append(note(`The first ${group.outputs.length} of ${group.whole} outputs.`));
      }
      cards.replaceChildren(...group.outputs.map(card));
      paint();
      tell(null);
    }

    const token = (event) => event.target.closest(".token");
    for (const kind of ["pointerover", "focusin", "click"]) {
      cards.addEventListener(kind, (event) => { if (token(event)) tell(token(event)); });
    }
    cards.addEventListener("keydown", (event) => {
      const from = token(event);
      const ways = { ArrowRight: "nextElementSibling",
        ArrowLeft: "previousElementSibling" };
      const next = from && ways[event.key] && from[ways[event.key]];
      if (!next) return;
      event.preventDefault();
      from.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
    place.append(
      note(`Outputs as the update saw them. ${data.groups.note}`),
      el("div", { className: "bar" }, labelled("search", search),
        labelled("sort by", choose([["step", "update"],
          ["spread", "spread of the rewards"], ["length", "longest output"]], order,
          (value) => { order = value; arrange(); })),
        labelled("group", pick), el("div", { className: "pair" }, back, on),
        labelled("colour", colour)),
      found, task, legend, cards, detail);
    search.addEventListener("input", arrange);
    arrange();
  }

  // -- samples -------------------------------------------------------------------

  function samples() {
    const place = section("samples");
    const rows = data.samples.rows;
    if (!rows.length) {
      place.append(note(data.samples.note));
      return;
    }
    rows.forEach((row) => {
      row.share = row.drawn ? row.right / row.drawn : 0;
      row.all = [row.problem, ...row.answers, ...row.texts].join("\n").toLowerCase();
    });
    const steps = [...new Set(rows.map((row) => row.step))];
    const orders = {
      step: (a, b) => a.step - b.step,
      latest: (a, b) => b.step - a.step,
      problem: (a, b) => (a.problem < b.problem ? -1 : a.problem > b.problem ? 1
        : a.step - b.step),
      most: (a, b) => b.share - a.share || a.step - b.step,
      least: (a, b) => a.share - b.share || a.step - b.step,
    };
    let order = "latest", step = "all", room = 12;
    const search = el("input", { type: "search", placeholder: "text of any of them" });
    const found = el("p", { className: "note" });
    found.setAttribute("aria-live", "polite");
    const list = el("div", { className: "stack" });
    const more = el("button", { type: "button" }, "show more");

    function card(row) {
      const header = el("header", {},
        el("b", {}, `update ${fmt(row.step)}`),
        el("span", {}, `answer ${row.answers.join(" or ") || "–"}`),
        el("span", {}, `${fmt(row.right)} of ${fmt(row.drawn)} correct`));
      const outputs = el("div", { className: "outputs" });
      row.texts.forEach((text, i) => {
        const good = row.correct[i];
        const mark = good === undefined ? "" : el("span",
          { className: `chip ${good ? "good" : "bad"}` },
          good ? "correct" : "not correct");
        outputs.append(el("div", {}, mark,
          isNumber(row.format[i]) ? ` format ${fmt(row.format[i])}` : "",
          scroller("text", `Output ${i + 1}`, visible(text) || "(empty)")));
      });
      return el("article", { className: "card" }, header,
        scroller("problem", "Problem", visible(row.problem)), outputs);
    }

    function show() {
      const wanted = search.value.toLowerCase();
      const kept = rows.filter((row) => row.all.includes(wanted)
        && (step === "all" || String(row.step) === step)).sort(orders[order]);
      found.textContent = `${fmt(kept.length)} of ${fmt(rows.length)} shown here.`;
      list.replaceChildren(...kept.slice(0, room).map(card));
      more.hidden = kept.length <= room;
    }

    const again = () => { room = 12; show(); };
    search.addEventListener("input", again);
    more.addEventListener("click", () => { room += 24; show(); });
    place.append(
      note(data.samples.note),
      el("div", { className: "bar" }, labelled("search", search),
        labelled("sort by", choose([["latest", "update, the last first"],
          ["step", "update, the first first"], ["problem", "problem"],
          ["most", "share correct, most first"],
          ["least", "share correct, least first"]], order,
          (value) => { order = value; again(); })),
        labelled("update", choose([["all", "all"], ...steps.map((s) => [s, fmt(s)])],
          step, (value) => { step = value; again(); }))),
      found, list, el("p", {}, more));
    show();
  }

  // -- cost and config -------------------------------------------------------------

  function bars(name, rows) {
    const most = Math.max(...rows.map((row) => row[1]));
    const body = el("tbody");
    for (const [label, value] of rows) {
      const fill = el("div", { className: "fill" });
      fill.style.width = `${(100 * Math.max(value, 0)) / most}%`;
      body.append(el("tr", {}, el("th", { scope: "row" }, label),
        el("td", {}, fmt(value)), el("td", {}, fill)));
    }
    return el("div", {}, el("h3", {}, name),
      el("table", { className: "bars" }, body));
  }

  function cost() {
    const { facts, notes } = data.cost;
    const place = section("cost");
    notes.forEach((text) => place.append(note(text)));
    const columns = el("div", { className: "columns" });
    if (facts.length) {
      const body = el("tbody");
      for (const [name, value] of facts) {
        body.append(el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, value)));
      }
      columns.append(el("div", {}, el("div", { className: "wide" },
        el("table", {}, body))));
    }
    for (const [name, rows] of Object.entries(data.cost.bars)) {
      columns.append(bars(name, rows));
    }
    place.append(columns);
  }

  function config() {
    const { rows, compared } = data.config;
    const place = section("config");
    if (data.config.note) place.append(note(data.config.note));
    if (!rows.length) return;
    const differing = rows.filter((row) => row[2] !== null).length;
    const search = el("input", { type: "search", placeholder: "key or value" });
    const only = el("input", { type: "checkbox", checked: differing > 0 });
    const body = el("tbody");

    function show() {
      const wanted = search.value.toLowerCase();
      body.replaceChildren();
      for (const [key, value, usual] of rows) {
        if (only.checked && usual === null) continue;
        if (!`${key} ${value}`.toLowerCase().includes(wanted)) continue;
        const row = el("tr", { className: usual === null ? "" : "differs" },
          el("th", { scope: "row" }, key), el("td", {}, value));
        if (compared) row.append(el("td", {}, usual === null ? "" : usual));
        body.append(row);
      }
    }

    const heads = ["key", "value", ...(compared ? ["tiny has"] : [])];
    const header = el("tr", {}, ...heads.map((h) => el("th", { scope: "col" }, h)));
    search.addEventListener("input", show);
    only.addEventListener("change", show);
    const bar = el("div", { className: "bar" }, labelled("search", search));
    if (compared) {
      bar.append(el("label", { className: "check" }, only,
        `only the ${differing} that differ from the preset tiny`));
    }
    place.append(bar, scroller("wide tall", "Configuration",
      el("table", {}, el("thead", {}, header), body)));
    show();
  }

  for (const part of [head, curves, doctor, groups, samples, cost, config]) part();
})();
