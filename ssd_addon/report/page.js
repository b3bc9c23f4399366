"use strict";
// The retrieval explorer: which images are near, by each space and by a mix of them. No network, no library.
(() => {
  const home = document.getElementById("explorer");
  if (!home) return;
  const data = JSON.parse(document.getElementById("explorer-data").textContent);
  const n = data.names.length;
  const shown = Math.min(8, n - 1);
  // Cosines of each space as int16, row by row: value / 32767. A space is addressed by its number, never by its name.
  const cosines = data.similarity.map((text) => {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return new Int16Array(bytes.buffer);
  });
  const picker = document.getElementById("picker");
  const tiles = [...picker.querySelectorAll("button")];
  const sliders = [...home.querySelectorAll("input[type=range]")];
  const weights = () => sliders.map((s) => Number(s.value));
  let chosen = 0;

  const nearest = (mix) => {
    const total = mix.reduce((sum, w) => sum + Math.abs(w), 0);
    if (!total) return [];
    const found = [];
    for (let j = 0; j < n; j++) {
      if (j === chosen) continue;
      let score = 0;
      mix.forEach((w, k) => { if (w) score += w * cosines[k][chosen * n + j]; });
      found.push([score / 32767 / total, j]);
    }
    return found.sort((a, b) => b[0] - a[0] || a[1] - b[1]).slice(0, shown);
  };

  const caption = (j) => data.names[j] || `image ${j + 1}`;

  const fill = (row, found, by) => {
    row.replaceChildren();
    if (!found.length) {
      row.textContent = shown ? "Move a slider away from 0." : "There is no other image.";
      return;
    }
    for (const [score, j] of found) {
      const button = document.createElement("button");
      button.type = "button";
      const img = tiles[j].querySelector("img").cloneNode();
      img.alt = "";
      const label = document.createElement("span");
      label.textContent = score.toFixed(2).replace("-0.00", "0.00");
      button.append(img, label);
      button.title = `${caption(j)}, similarity ${score.toFixed(3)} by ${by}`;
      button.setAttribute("aria-label", button.title);
      button.addEventListener("click", () => choose(j));
      row.append(button);
    }
  };

  const mixed = () => {
    if (!sliders.length) return; // one space alone: there is nothing to mix
    fill(document.getElementById("by-mix"), nearest(weights()), "your mix");
    for (const s of sliders) {
      document.getElementById(`out-${s.id}`).textContent = Number(s.value).toFixed(1);
    }
  };

  const choose = (j, focus = false) => {
    tiles[chosen].setAttribute("aria-selected", "false");
    tiles[chosen].tabIndex = -1;
    chosen = j;
    tiles[j].setAttribute("aria-selected", "true");
    tiles[j].tabIndex = 0;
    if (focus) tiles[j].focus();
    // Within the picker alone: the page itself stays where it is.
    const top = tiles[j].offsetTop - picker.offsetTop;
    if (top < picker.scrollTop || top + tiles[j].offsetHeight > picker.scrollTop + picker.clientHeight) {
      picker.scrollTop = top - picker.clientHeight / 2;
    }
    const picture = document.getElementById("chosen-image");
    picture.src = tiles[j].querySelector("img").src;
    picture.alt = caption(j);
    document.getElementById("chosen-name").textContent = `Chosen: ${caption(j)} (${j + 1} of ${n})`;
    for (const row of home.querySelectorAll(".row[data-space]")) {
      const k = Number(row.dataset.index);
      fill(row, nearest(data.spaces.map((_, j) => Number(j === k))), data.spaces[k]);
    }
    mixed();
  };

  tiles.forEach((tile, j) => tile.addEventListener("click", () => choose(j)));
  picker.addEventListener("keydown", (event) => {
    const columns = getComputedStyle(picker).gridTemplateColumns.split(" ").length;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    let j = step === undefined ? { Home: 0, End: n - 1 }[event.key] : chosen + step;
    if (j === undefined) return;
    event.preventDefault();
    j = Math.max(0, Math.min(n - 1, j));
    if (j !== chosen) choose(j, true);
  });
  sliders.forEach((s) => s.addEventListener("input", mixed));
  for (const button of home.querySelectorAll("[data-mix]")) {
    button.addEventListener("click", () => {
      const mix = JSON.parse(button.dataset.mix);
      sliders.forEach((s, k) => { s.value = mix[k]; });
      mixed();
    });
  }
  window.addEventListener("beforeprint", () => {
    for (const d of document.querySelectorAll("details")) d.open = true;
  });
  choose(0);
})();
