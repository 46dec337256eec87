"use strict";
// What both pages need. Prompts, names and settings reach the page as text nodes only, never as HTML.

const byId = (id) => document.getElementById(id);
const readJSON = (id) => JSON.parse(byId(id).textContent);

function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}
const el = (tag, attributes = {}, ...children) => build(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const range = (n) => Array.from({ length: n }, (_, i) => i);
const decoded = ({ values, codes }) => codes.map((code) => values[code]);

function floats(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}

// Numbers in [0, 1) from a seed (mulberry32).
function random(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

function shuffle(list, draw) {
  for (let i = list.length - 1; i > 0; i--) {
    const j = Math.floor(draw() * (i + 1));
    [list[i], list[j]] = [list[j], list[i]];
  }
  return list;
}

const formats = new Map();
function number(value, decimals = 0, signed = false) {
  if (value === null || !Number.isFinite(value)) return "–";
  const key = `${decimals}${signed}`;
  if (!formats.has(key)) {
    formats.set(key, new Intl.NumberFormat("en", {
      minimumFractionDigits: decimals, maximumFractionDigits: decimals, signDisplay: signed ? "exceptZero" : "negative",
    }));
  }
  return formats.get(key).format(value).replace("-", "−");
}

// Decimals that leave `digits` significant digits of something as small as `size`.
const decimalsFor = (size, digits) =>
  size > 0 ? Math.min(6, Math.max(0, digits - 1 - Math.floor(Math.log10(size)))) : 2;

// Where the image of an item is: a URL; null where there is none; undefined while the page that holds it is loading.
function imageSource(images, item, method) {
  if (images === null) return null;
  if (images.embedded) {
    const block = byId(`item-${item}`);
    if (block === null) return document.readyState === "loading" ? undefined : null;
    return JSON.parse(block.textContent)[method];
  }
  const { prefix, rest } = images.urls[method];
  return rest[item] === null ? null : prefix + rest[item];
}
