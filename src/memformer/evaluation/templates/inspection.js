"use strict";
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const config = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
  const font = { family: "system-ui, sans-serif", size: 13 };
  const byId = (id) => document.getElementById(id);
  let current = 0;

  // Weights are 16-bit numbers in base64: 65535 stands for 1.
  function unpack(packed) {
    const bytes = Uint8Array.from(atob(packed.data), (character) => character.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    let position = 0;
    function fill(shape) {
      return Array.from({ length: shape[0] }, () => {
        if (shape.length > 1) return fill(shape.slice(1));
        const value = view.getUint16(2 * position, true) / 65535;
        position += 1;
        return value;
      });
    }
    return fill(packed.shape);
  }

  // Plotly reads a few HTML tags in labels; a text must not become one.
  const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const visible = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ +$/, (spaces) => "␣".repeat(spaces.length));
  const label = (text, id) => escaped(visible(text === undefined ? String(id) : text));
  const place = (step) => (data.num_documents > 1 ? `document ${step.document}, ` : "") + `timestep ${step.timestep}`;
  const texts = (names, ids) => ids.map((id, index) => label(names[index], id));
  const number = (value, digits) => (value === null ? "–" : value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits }));

  // Three significant digits: the lengths of forgetting vectors differ by factors of thousands.
  const short = (value) => (value === null ? "–" : Number(value.toPrecision(3)).toString());

  function element(tag, text, className) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  function height(slots) {
    return Math.max(260, Math.min(640, 14 * slots + 110));
  }

  const steps = data.timesteps;
  const numSlots = data.slots.length;
  const slotNames = data.slots.map((slot) => slot.slot);

  function drawKept() {
    const columns = steps.map((step) => unpack(step.kept));
    const every = Math.max(1, Math.ceil(steps.length / 24));
    const ticks = steps.map((_, index) => index).filter((index) => index % every === 0);
    const trace = {
      type: "heatmap", zmin: 0, zmax: 1, colorscale: "Viridis", colorbar: { title: { text: "kept" } },
      z: slotNames.map((_, slot) => columns.map((column) => column[slot])),
      x: steps.map((_, index) => index), y: slotNames, text: slotNames.map(() => steps.map(place)),
      hovertemplate: "%{text}<br>slot %{y}: %{z:.3f}<extra></extra>",
    };
    const layout = {
      font, height: height(numSlots), margin: { l: 60, r: 20, t: 34, b: 60 },
      xaxis: { title: { text: data.num_documents > 1 ? "document : timestep" : "timestep" }, tickvals: ticks, ticktext: ticks.map((index) => (data.num_documents > 1 ? `${steps[index].document}:` : "") + steps[index].timestep) },
      yaxis: { title: { text: "slot" }, autorange: "reversed" }, shapes: [],
    };
    Plotly.newPlot("kept", [trace], layout, config);
    byId("kept").on("plotly_click", (event) => select(event.points[0].x));
  }

  function tokenAxis(names, domain) {
    const every = Math.max(1, Math.ceil(names.length / 128));
    const ticks = names.map((_, index) => index).filter((index) => index % every === 0);
    return {
      title: { text: "tokens that are read" }, domain, tickvals: ticks, ticktext: ticks.map((index) => names[index] || " "),
      tickfont: { family: "ui-monospace, monospace", size: 11 }, tickangle: names.some((name) => name.length > 2) ? -90 : 0,
    };
  }

  function drawWriter(step) {
    const weights = unpack(step.writer);
    const names = texts(step.read_texts, step.read_ids);
    const own = {
      type: "heatmap", z: weights.map((row) => [row[0]]), x: ["itself"], y: slotNames, xaxis: "x", zmin: 0, zmax: 1,
      colorscale: "Viridis", showscale: false, hovertemplate: "slot %{y} for itself: %{z:.4f}<extra></extra>",
    };
    const tokens = {
      type: "heatmap", z: weights.map((row) => row.slice(1)), x: names.map((_, index) => index), y: slotNames, xaxis: "x2",
      text: weights.map(() => names), zmin: 0, colorscale: "Blues", reversescale: true, colorbar: { title: { text: "weight" } },
      hovertemplate: "slot %{y}, token %{x} “%{text}”: %{z:.4f}<extra></extra>",
    };
    Plotly.react("writer", [own, tokens], {
      font, height: height(numSlots), margin: { l: 60, r: 20, t: 34, b: 80 }, xaxis: { domain: [0, 0.05] },
      xaxis2: { ...tokenAxis(names, [0.07, 1]), anchor: "y" }, yaxis: { title: { text: "slot" }, autorange: "reversed" },
    }, config);
  }

  function drawReader(step) {
    const weights = unpack(step.readers)[Number(byId("layer").value)];
    const names = texts(step.read_texts, step.read_ids);
    const trace = {
      type: "heatmap", z: slotNames.map((_, slot) => weights.map((row) => row[slot])), x: names.map((_, index) => index), y: slotNames,
      text: slotNames.map(() => names), zmin: 0, colorscale: "Blues", reversescale: true, colorbar: { title: { text: "weight" } },
      hovertemplate: "token %{x} “%{text}” from slot %{y}: %{z:.4f}<extra></extra>",
    };
    Plotly.react("reader", [trace], {
      font, height: height(numSlots), margin: { l: 60, r: 20, t: 34, b: 80 },
      xaxis: tokenAxis(names, [0, 1]), yaxis: { title: { text: "slot" }, autorange: "reversed" },
    }, config);
  }

  function select(index) {
    current = Math.max(0, Math.min(steps.length - 1, index));
    const step = steps[current];
    byId("timestep").value = String(current);
    byId("selected").textContent = `${place(step)}: reads ${step.read_ids.length} tokens`;
    Plotly.relayout("kept", {
      shapes: [{ type: "rect", x0: current - 0.5, x1: current + 0.5, y0: -0.5, y1: numSlots - 0.5, line: { color: "#d62728", width: 2 } }],
    });
    drawWriter(step);
    drawReader(step);
    document.querySelectorAll(".step").forEach((part) => part.classList.toggle("selected", Number(part.dataset.index) === current));
  }

  function jump(index) {
    const button = element("button", `show ${place(steps[index])}`);
    button.addEventListener("click", () => {
      select(index);
      byId("kept").scrollIntoView({ behavior: "smooth" });
    });
    return button;
  }

  function fillText() {
    const box = byId("text");
    if (data.image_width) box.classList.add("image");
    steps.forEach((step, index) => {
      const previous = steps[index - 1];
      const follows = previous && previous.index + 1 === step.index;
      if (previous && !follows) box.append(element("div", "…", "gap"));
      if (!follows || step.document !== previous.document || !data.image_width) {
        const head = element("button", follows && step.document === previous.document ? String(step.timestep) : place(step));
        head.title = place(step);
        head.addEventListener("click", () => select(index));
        if (data.image_width && previous) box.append(element("br"));
        box.append(head, data.image_width ? element("br") : "");
      }
      const part = element("span", undefined, "step");
      part.dataset.index = String(index);
      step.target_ids.forEach((id, token) => {
        const span = element("span", step.target_texts[token] === undefined ? `${id} ` : step.target_texts[token]);
        span.dataset.memory = String(step.nll[token]);
        span.dataset.erased = String(step.nll_erased[token]);
        span.title = `${number(step.nll[token], 3)} nats with memory, ${number(step.nll_erased[token], 3)} erased`;
        part.append(span);
        if (data.image_width && (step.timestep * data.segment_length + token + 1) % data.image_width === 0) part.append("\n");
      });
      box.append(part);
    });
  }

  function quantile(values) {
    const sorted = values.slice().sort((a, b) => a - b);
    return sorted.length ? Math.max(1e-6, sorted[Math.floor(0.98 * (sorted.length - 1))]) : 1;
  }

  const surprisals = steps.flatMap((step) => [...step.nll, ...step.nll_erased]);
  const differences = steps.flatMap((step) => step.nll.map((value, token) => Math.abs(step.nll_erased[token] - value)));
  const limits = { memory: quantile(surprisals), erased: quantile(surprisals), difference: quantile(differences) };

  function colour() {
    const mode = document.querySelector("input[name=mode]:checked").value;
    byId("scale").textContent = mode === "difference"
      ? `blue: the memory saves, orange: it costs; full colour at ${number(limits[mode], 2)} nats`
      : `full colour at ${number(limits[mode], 2)} nats`;
    document.querySelectorAll("#text .step span").forEach((span) => {
      const intact = Number(span.dataset.memory);
      const erased = Number(span.dataset.erased);
      const value = mode === "memory" ? intact : mode === "erased" ? erased : erased - intact;
      const share = Math.min(1, Math.abs(value) / limits[mode]).toFixed(3);
      const base = mode !== "difference" ? "214, 39, 40" : value >= 0 ? "31, 119, 180" : "255, 127, 14";
      span.style.backgroundColor = `rgba(${base}, ${share})`;
    });
  }

  function written(write) {
    if (write === null) return "never";
    const where = (data.num_documents > 1 ? `document ${write.document}, ` : "") + `timestep ${write.timestep}`;
    return where + (write.text ? `: “${visible(write.text)}”` : `, token ${write.token}`);
  }

  function fillSlots() {
    const body = document.querySelector("#slots tbody");
    data.slots.forEach((slot) => {
      const row = element("tr");
      const measured = slot.half_life_measured !== null ? number(slot.half_life_measured, 1)
        : slot.half_life_at_least !== null ? `> ${number(slot.half_life_at_least, 0)}` : "–";
      row.append(
        element("td", String(slot.slot)), element("td", slot.kind, `left kind-${slot.kind.split(" ")[0]}`),
        element("td", number(slot.mean_own_weight, 3)), element("td", number(slot.mean_kept, 3)),
        element("td", short(slot.forgetting_norm)), element("td", slot.half_life === "infinite" ? "never gone" : number(slot.half_life, 1)),
        element("td", measured), element("td", number(slot.share_left === null ? null : Math.abs(slot.share_left) < 0.005 ? 0 : slot.share_left, 2)), element("td", written(slot.last_write), "left"),
      );
      body.append(row);
    });
  }

  function fillPassages() {
    const box = byId("passages");
    const none = data.max_passages ? "The memory helped in no passage." : "No passages were asked for.";
    if (!data.passages.length) box.append(element("p", none));
    data.passages.forEach((passage) => {
      const part = element("div", undefined, "passage");
      const head = element("p", `${number(passage.gain, 2)} nats saved (${number(passage.nll_erased, 2)} erased, ${number(passage.nll, 2)} with memory), ${place(passage)}`);
      const index = steps.findIndex((step) => step.index === passage.index);
      if (index >= 0) head.append(jump(index));
      const text = element("div", undefined, "text");
      text.append(element("span", passage.context, "before"), element("span", passage.text || passage.token_ids.join(" "), "found"));
      const slots = passage.slots.map((slot) => `slot ${slot.slot} (${number(slot.weight, 3)}), written: ${written(slot.last_write)}`);
      part.append(head, text, element("p", `read most: ${slots.join("; ")}`, "note"));
      box.append(part);
    });
  }

  data.num_layers = steps.length ? steps[0].readers.shape[0] : 0;
  for (let layer = 0; layer < data.num_layers; layer += 1) {
    const option = element("option", String(layer + 1));
    option.value = String(layer);
    byId("layer").append(option);
  }
  byId("timestep").max = String(Math.max(0, steps.length - 1));
  byId("timestep").addEventListener("input", (event) => select(Number(event.target.value)));
  byId("layer").addEventListener("change", () => drawReader(steps[current]));
  document.querySelectorAll("input[name=mode]").forEach((input) => input.addEventListener("change", colour));
  byId("timesteps").hidden = !steps.length;
  fillText();
  colour();
  fillSlots();
  fillPassages();
  if (steps.length) {
    drawKept();
    select(Math.floor(steps.length / 2));
  }
})();
