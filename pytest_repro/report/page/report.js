"use strict";
// Draws what is opened, filters the list. Elements are made from text only: nothing of a model is ever parsed as markup.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const HEIGHT = 230, LEFT = 46, RIGHT = 10, TOP = 10, BOTTOM = 24;
  const AROUND = 5;

  const fill = (node, attributes, children) => {
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children.filter((child) => child !== null));
    return node;
  };
  const make = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
  const draw = (name, attributes = {}, ...children) => fill(document.createElementNS(SVG, name), attributes, children);

  const known = (value) => value !== null && value !== undefined;
  const short = (value) => (known(value) ? String(Number(value.toPrecision(3))).replace("-", "−") : "–");
  const share = (logp) => {
    if (!known(logp)) return "–";
    const percent = 100 * Math.min(Math.exp(logp), 1);
    return (percent >= 0.001 ? Number(percent.toPrecision(3)) : percent === 0 ? "0" : "<0.001") + " %";
  };
  const sum = (...terms) => (terms.every(known) ? terms.reduce((a, b) => a + b) : null);
  const less = (a, b) => (known(a) && known(b) ? a - b : null);

  const probabilities = (data, i) => {
    const now = sum(data.logprob[i], data.dlogp[i]);
    return {
      then: share(data.logprob[i]), now: share(now),
      runnerThen: share(less(data.logprob[i], data.gap[i])), runnerNow: share(less(now, data.gap_now[i])),
    };
  };
  const flipped = (data, i) => known(data.deficit[i]) && data.deficit[i] > 0;

  // --- a prompt's course -------------------------------------------------------------------------------------------

  function course(place) {
    const data = JSON.parse(document.getElementById(place.dataset.from).textContent);
    const count = data.tokens.length;
    if (data.asked) place.append(folded("What was asked", () => [text(data.asked)]));
    if (data.golden) place.append(folded("Whole texts", () => whole(data)));
    if (!count) return;
    const flips = data.tokens.map((_, i) => i).filter((i) => flipped(data, i));
    const start = known(data.at) ? Math.min(data.at, count - 1) : flips.length ? flips[0] : 0;
    place.append(make("h4", {}, "Margin along the golden's tokens"), legend(data), ...margins(data, place.dataset.from, start));
    place.append(make("p", { class: "small" }, flips.length
      ? `Another token than the golden's is now best at ${flips.length} of ${count} places: ` +
        flips.slice(0, 20).map((i) => `${i} (by ${short(data.deficit[i])})`).join(", ") + (flips.length > 20 ? " …" : ".")
      : data.deficit.some(known) ? "The golden's token is the best one wherever that was seen."
        : "Which token is the best one now was not seen."));
    if (known(data.at) && data.deficit[data.at] === 0) {
      place.append(make("p", { class: "small" }, `Decoding parted at token ${data.at}, where the replay drawn here still prefers the golden's token: ` +
        (known(data.gap[data.at]) && data.gap[data.at] <= data.envelope ? "a near tie, which the two round differently."
          : "no near tie, so suspect what only decoding has (KV cache, sampler, stop rules).")));
    }
    if (known(data.at)) {
      place.append(make("h4", {}, "Around the first divergence: probabilities then → now"),
        scrolled("tokens around the first divergence", tokens(data, Math.max(0, start - AROUND), Math.min(count, start + AROUND + 1))));
    }
    place.append(folded(`All ${count} tokens as a table`, () => [scrolled("all tokens", tokens(data, 0, count))]));
  }

  const text = (content) => make("p", { class: "t whole", tabindex: "0" }, content);

  function folded(title, content) {
    const box = make("details", {}, make("summary", {}, title));
    box.addEventListener("toggle", () => {
      if (box.open && box.childElementCount === 1) box.append(...content());
    });
    return box;
  }

  function scrolled(name, content) {
    return make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": name }, content);
  }

  function whole(data) {
    const side = (name, pieces) => make("div", {},
      make("h4", {}, name),
      pieces === null ? make("p", { class: "small" }, "It was replayed and not generated, so there is no text of it.")
        : make("p", { class: "t whole", tabindex: "0" },
          make("span", { class: "same" }, pieces[0]),
          ...(pieces[1] === "" ? [] : [make("mark", {}, make("span", { class: "unseen" }, "first divergence: "), pieces[1])]),
          pieces[2]));
    return [make("div", { class: "both" }, side("golden", data.golden), side("now", data.now))];
  }

  function tokens(data, from, to) {
    const head = ["#", "golden's token", "its runner-up", "gap", "Δlogp"];
    const body = make("tbody");
    for (let i = from; i < to; i++) {
      const p = probabilities(data, i);
      const here = i === data.at;
      const said = (here ? " ◀ first divergence" : "") + (flipped(data, i) ? ` ▼ another is best, by ${short(data.deficit[i])}` : "");
      body.append(make("tr", here ? { class: "here" } : {},
        make("th", { scope: "row" }, String(i)),
        make("td", {}, make("span", { class: "t" }, data.tokens[i]), said, " ", make("span", { class: "p" }, `${p.then} → ${p.now}`)),
        make("td", {}, make("span", { class: "t" }, data.runner_up[i]), " ", make("span", { class: "p" }, `${p.runnerThen} → ${p.runnerNow}`)),
        make("td", {}, `${short(data.gap[i])} → ${short(data.gap_now[i])}`),
        make("td", { class: "n" }, short(data.dlogp[i]))));
    }
    return make("table", { class: "tokens" },
      make("thead", {}, make("tr", {}, ...head.map((name) => make("th", { scope: "col" }, name)))), body);
  }

  // --- the margin plot ---------------------------------------------------------------------------------------------

  function legend(data) {
    const sample = (...shapes) => draw("svg", { width: 26, height: 12, "aria-hidden": "true" }, ...shapes);
    const stroke = (name) => draw("line", { class: name, x1: 0, x2: 26, y1: 6, y2: 6 });
    return make("ul", { class: "legend" },
      make("li", {}, sample(stroke("then-line")), "golden's gap to its runner-up, then"),
      make("li", {}, sample(stroke("now-line")), "the same gap now; below 0 the runner-up leads"),
      known(data.envelope) && data.envelope > 0
        ? make("li", {}, sample(draw("rect", { class: "band", width: 26, height: 12 })), `±${short(data.envelope)} nats, what rounding moves`) : null,
      make("li", {}, sample(draw("path", { class: "flip", d: "M8 2h10l-5 8z" })), "another token is best now, by so much"),
      known(data.at) ? make("li", {}, sample(stroke("parting")), "first divergence") : null);
  }

  // Linear within the envelope, where a token may flip, and logarithmic beyond it: both can be read, at 2e-5 nats and at 20.
  function scale(data) {
    const unit = data.envelope > 0 ? data.envelope : 0.1;
    const bend = (v) => (Math.abs(v) <= unit ? v / unit : Math.sign(v) * (1 + Math.log10(Math.abs(v) / unit)));
    const values = [...data.gap, ...data.gap_now, ...data.deficit.map((d) => (known(d) ? -d : null))].filter(known).map(bend);
    const high = Math.max(1.4, ...values), low = Math.min(-1.4, ...values);
    const y = (v) => TOP + ((high - bend(v)) / (high - low)) * (HEIGHT - TOP - BOTTOM);
    const ticks = [0, unit, -unit];
    for (const first of [1, 5, 2]) {  // powers of ten before what stands between them
      for (let power = -12; power <= 3; power++) ticks.push(first * 10 ** power, -first * 10 ** power);
    }
    const shown = [];
    for (const v of ticks) {
      if (bend(v) > high || bend(v) < low || (Math.abs(v) < unit && v !== 0)) continue;
      if (shown.every((other) => Math.abs(y(other) - y(v)) >= 18)) shown.push(v);
    }
    return { y, ticks: shown };
  }

  function margins(data, name, start) {
    const count = data.tokens.length;
    const { y, ticks } = scale(data);
    const holder = make("div", { class: "plotted" });
    const readout = make("output", { class: "readout" });
    const slider = make("input", { type: "range", min: "0", max: String(count - 1), value: String(start), autocomplete: "off", "aria-label": "token to read" });
    let x, cursor, drawn = 0;

    const redraw = () => {
      const width = Math.floor(holder.clientWidth);
      if (!width || width === drawn) return;
      drawn = width;
      x = (i) => LEFT + ((i + 0.5) / count) * (width - LEFT - RIGHT);
      const plot = draw("svg", { class: "plot", role: "img", height: HEIGHT, "aria-labelledby": `${name}-t ${name}-d` },
        draw("title", { id: `${name}-t` }, "Margin of the golden's token along the text"),
        draw("desc", { id: `${name}-d` }, described(data)));
      if (data.envelope > 0) {
        plot.append(draw("rect", { class: "band", x: LEFT, width: width - LEFT - RIGHT, y: y(data.envelope), height: y(-data.envelope) - y(data.envelope) }));
      }
      for (const v of ticks) {
        plot.append(draw("line", { class: v === 0 ? "axis" : "grid", x1: LEFT, x2: width - RIGHT, y1: y(v), y2: y(v) }),
          draw("text", { class: "tick", x: LEFT - 5, y: y(v) + 4, "text-anchor": "end" }, short(v)));
      }
      const step = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000].find((s) => (s / count) * (width - LEFT) >= 36) || count;
      for (let i = 0; i < count; i += step) {
        plot.append(draw("text", { class: "tick", x: x(i), y: HEIGHT - 6, "text-anchor": "middle" }, String(i)));
      }
      plot.append(draw("path", { class: "then-line", d: line(data.gap, x, y) }), draw("path", { class: "now-line", d: line(data.gap_now, x, y) }));
      if (known(data.at)) plot.append(draw("line", { class: "parting", x1: x(data.at), x2: x(data.at), y1: TOP - 6, y2: HEIGHT - BOTTOM }));
      data.deficit.forEach((d, i) => {
        if (d > 0) plot.append(draw("path", { class: "flip", d: `M${(x(i) - 5).toFixed(1)} ${(y(-d) - 4).toFixed(1)}h10l-5 8z` }));
      });
      cursor = draw("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM });
      plot.append(cursor);
      plot.addEventListener("pointermove", (event) => {
        const at = ((event.clientX - plot.getBoundingClientRect().left - LEFT) / (width - LEFT - RIGHT)) * count;
        slider.value = String(Math.floor(at));
        point();
      });
      holder.replaceChildren(plot);
      point();
    };

    const point = () => {
      const i = Number(slider.value);
      fill(cursor, { x1: x(i), x2: x(i) }, []);
      const p = probabilities(data, i);
      const bit = (content) => make("span", { class: "t" }, content);
      readout.replaceChildren(`${i}: golden `, bit(data.tokens[i]), ` ${p.then} → ${p.now}, runner-up `, bit(data.runner_up[i]),
        ` ${p.runnerThen} → ${p.runnerNow}, gap ${short(data.gap[i])} → ${short(data.gap_now[i])}` +
        (flipped(data, i) ? `, another token is best by ${short(data.deficit[i])}` : ""));
    };
    slider.addEventListener("input", point);
    new ResizeObserver(redraw).observe(holder);
    return [holder, slider, readout];
  }

  function line(values, x, y) {
    let path = "", pen = false;
    values.forEach((v, i) => {
      if (!known(v)) { pen = false; return; }
      path += `${pen ? "L" : "M"}${x(i).toFixed(1)} ${y(v).toFixed(1)}`;
      if (!pen && !known(values[i + 1])) path += "h1";
      pen = true;
    });
    return path;
  }

  function described(data) {
    const gaps = data.gap.filter(known), flips = data.deficit.filter((d) => d > 0);
    const narrow = data.envelope > 0 ? gaps.filter((gap) => gap <= data.envelope).length : 0;
    return `${data.tokens.length} tokens. The golden's gap lies within the envelope at ${narrow} of them, where rounding may flip a token. ` +
      (flips.length ? `Another token is best now at ${flips.length}, by ${short(Math.max(...flips))} nats at most.` : "No token flipped.") +
      (known(data.at) ? ` The first divergence is at token ${data.at}.` : "") + " The same as a table follows.";
  }

  // --- the list ----------------------------------------------------------------------------------------------------

  function open(prompt) {
    const place = prompt.querySelector(".course:empty");
    if (prompt.open && place) course(place);
  }

  function filterable(section) {
    const box = section.querySelector(".filter");
    const prompts = [...section.querySelectorAll(".prompt")];
    const [checks, search, told] = [[...box.querySelectorAll("[type=checkbox]")], box.querySelector("[type=search]"), box.querySelector("output")];
    const apply = () => {
      const verdicts = new Set(checks.filter((c) => c.checked).map((c) => c.value));
      const part = search.value.toLowerCase();
      let shown = 0;
      for (const prompt of prompts) {
        prompt.hidden = !(verdicts.has(prompt.dataset.verdict) && prompt.dataset.id.toLowerCase().includes(part));
        shown += !prompt.hidden;
      }
      told.textContent = `${shown} of ${prompts.length} shown`;
    };
    box.addEventListener("input", apply);
    box.hidden = false;
    apply();
  }

  // A link to a prompt opens it, whatever the filter hides.
  function follow() {
    const prompt = document.getElementById(location.hash.slice(1));
    if (!prompt || !prompt.matches(".prompt")) return;
    for (let box = prompt; box; box = box.parentElement.closest("details")) box.open = true;
    prompt.hidden = false;
    prompt.querySelector("summary").focus();
    prompt.scrollIntoView();
  }

  for (const section of document.querySelectorAll(".prompts")) filterable(section);
  for (const prompt of document.querySelectorAll(".prompt")) {
    prompt.addEventListener("toggle", () => open(prompt));
    open(prompt);
  }
  addEventListener("hashchange", follow);
  follow();
})();
