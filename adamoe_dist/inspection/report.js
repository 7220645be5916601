'use strict';
(() => {
  const byId = (name) => document.getElementById(name);
  const data = JSON.parse(byId('data').textContent);
  const tokens = Array.from(document.querySelectorAll('#text i'));
  const count = data.tokens;

  const decode = (text, isWide) => {
    const raw = atob(text);
    const bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    if (!isWide) return bytes;
    const values = new Uint16Array(raw.length / 2);
    for (let i = 0; i < values.length; i++) values[i] = bytes[2 * i] + 256 * bytes[2 * i + 1];
    return values;
  };
  const loads = decode(data.loads, false);
  const experts = decode(data.experts, data.wide.experts);
  const weights = decode(data.weights, false);
  const positions = decode(data.positions, data.wide.positions);
  const classes = Object.entries(data.classes).map(([name, text]) => [data.labels[name], decode(text, false)]);
  const otherLoads = data.other ? decode(data.other.loads, false) : null;

  const means = (values) => {
    const layers = values.length / count;
    const sums = new Float64Array(count);
    for (let i = 0; i < values.length; i++) sums[i % count] += values[i];
    return sums.map((sum) => sum / layers);
  };
  const meanLoads = means(loads);
  const otherMeans = otherLoads ? means(otherLoads) : null;
  const layerStarts = [0];
  for (let i = 0, sum = 0; i < loads.length; i++) {
    sum += loads[i];
    if ((i + 1) % count === 0) layerStarts.push(sum);
  }

  let layer = -1;
  let view = 'load';
  let current = 0;

  // The number that a token shows in the present view; NaN where there is none.
  const valueOf = (token) => {
    if (view === 'load') return layer < 0 ? meanLoads[token] : loads[layer * count + token];
    if (layer < 0) return meanLoads[token] - otherMeans[token];
    return data.other.sameLayers ? loads[layer * count + token] - otherLoads[layer * count + token] : NaN;
  };
  const range = () => {
    if (view === 'load') return layer < 0 ? data.meanScale : [0, data.k];
    return layer < 0 ? [-data.other.meanScale, data.other.meanScale] : [-data.other.scale, data.other.scale];
  };
  const shadeOf = (value) => {
    if (Number.isNaN(value)) return 'none';
    const [low, high] = range();
    const step = Math.floor(((value - low) / (high - low)) * 8 + 0.5);
    return (view === 'load' ? 's' : 'd') + Math.max(0, Math.min(8, step));
  };
  const format = (value) => {
    if (Number.isNaN(value)) return '?';
    const sign = view === 'difference' && value > 0 ? '+' : '';
    return sign + (layer < 0 ? value.toFixed(1) : String(value));
  };

  const paint = () => {
    const isNumbered = byId('numbers').checked;
    byId('text').classList.toggle('numbered', isNumbered);
    for (let token = 0; token < count; token++) {
      const value = valueOf(token);
      const element = tokens[token];
      element.className = shadeOf(value);
      if (isNumbered) element.dataset.load = format(value);
    }
    drawLegend();
    describe(current);
  };

  const drawLegend = () => {
    const [low, high] = range();
    const isWhole = layer >= 0 && view === 'load' && data.k <= 8;
    const values = isWhole
      ? Array.from({ length: data.k + 1 }, (_, i) => i)
      : Array.from({ length: 9 }, (_, i) => low + ((high - low) * i) / 8);
    const items = values.map((value) => {
      const item = document.createElement('i');
      item.className = shadeOf(value);
      const digits = isWhole ? 0 : layer < 0 ? 2 : 1;
      item.textContent = (view === 'difference' && value > 0 ? '+' : '') + value.toFixed(digits);
      return item;
    });
    const words = document.createElement('span');
    const place = layer < 0 ? 'mean over layers' : `layer ${data.layers[layer]}`;
    words.textContent = `${place}: ${view === 'load' ? 'experts a token' : 'experts more or fewer'}\u00a0`;
    byId('legend').replaceChildren(words, ...items);
  };

  const chosen = (token, at) => {
    let place = layerStarts[at];
    const first = at * count;
    for (let i = 0; i < token; i++) place += loads[first + i];
    const parts = [];
    for (let i = 0; i < loads[first + token]; i++) {
      parts.push(`${experts[place + i]} (${(weights[place + i] / 255).toFixed(2)})`);
    }
    return parts.length ? parts.join(', ') : 'none';
  };

  const describe = (token) => {
    const detail = byId('detail');
    const name = document.createElement('b');
    const shade = shadeOf(valueOf(token));
    name.className = shade;
    name.textContent = tokens[token].textContent;
    const kinds = classes.map(([labels, of]) => (of[token] ? labels[of[token] - 1] : '')).filter(Boolean);
    const lines = [
      ` token ${token + 1} of ${count}, position ${positions[token]}; ${kinds.join(', ')}. ` +
        `Mean over layers ${meanLoads[token].toFixed(2)}` +
        (otherMeans ? `, in the other model ${otherMeans[token].toFixed(2)}` : '') + '.',
    ];
    if (layer < 0) {
      const each = data.layers.map((number, at) => `${number}: ${loads[at * count + token]}`);
      lines.push(`True experts by layer: ${each.join(', ')}.`);
    } else {
      const number = loads[layer * count + token];
      const other = otherLoads && data.other.sameLayers ? `, in the other model ${otherLoads[layer * count + token]}` : '';
      lines.push(`Layer ${data.layers[layer]}: ${number} of ${data.n} true experts${other}. Expert (weight): ${chosen(token, layer)}.`);
    }
    detail.replaceChildren(name, lines[0], document.createElement('br'), lines[1]);
  };

  const go = (token, isFocused) => {
    const next = Math.max(0, Math.min(count - 1, token));
    tokens[current].removeAttribute('tabindex');
    current = next;
    tokens[current].tabIndex = 0;
    describe(current);
    if (isFocused) tokens[current].focus();
  };

  const choose = (value) => {
    layer = Number(value);
    byId('layer').value = String(layer);
    byId('slider').value = String(layer);
    byId('slider').setAttribute('aria-valuetext', layer < 0 ? 'mean over layers' : `layer ${data.layers[layer]}`);
    paint();
  };

  const index = new Map(tokens.map((element, number) => [element, number]));
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -20, ArrowDown: 20, PageUp: -200, PageDown: 200 };
  byId('text').addEventListener('mouseover', (event) => {
    if (index.has(event.target)) describe(index.get(event.target));
  });
  byId('text').addEventListener('mouseleave', () => describe(current));
  byId('text').addEventListener('click', (event) => {
    if (index.has(event.target)) go(index.get(event.target), true);
  });
  byId('text').addEventListener('keydown', (event) => {
    const places = { Home: 0, End: count - 1 };
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key in steps) go(current + steps[event.key], true);
    else if (event.key in places) go(places[event.key], true);
    else return;
    event.preventDefault();
  });
  byId('layer').addEventListener('change', (event) => choose(event.target.value));
  byId('slider').addEventListener('input', (event) => choose(event.target.value));
  byId('numbers').addEventListener('change', paint);
  if (byId('view')) {
    byId('view').addEventListener('change', (event) => {
      view = event.target.value;
      paint();
    });
  }

  for (const group of document.querySelectorAll('.switch')) {
    const figures = Array.from(group.querySelectorAll('figure'));
    if (figures.length < 2) continue;
    const select = document.createElement('select');
    select.setAttribute('aria-label', 'layer of the picture');
    figures.forEach((figure, number) => select.add(new Option(figure.dataset.name, String(number))));
    const show = () => figures.forEach((figure, number) => { figure.hidden = number !== Number(select.value); });
    select.addEventListener('change', show);
    group.prepend(select);
    show();
  }

  byId('controls').hidden = false;
  tokens[current].tabIndex = 0;
  paint();
})();
