"use strict";
const at = (id) => document.getElementById(id);
const made = (tag, values, ...children) => {
  const element = Object.assign(document.createElement(tag), values);
  element.append(...children);
  return element;
};

const token = new URLSearchParams(location.search).get("token");
const headers = token ? { Authorization: `Bearer ${token}` } : {};
const LARGEST = 64 << 20; // a longer body is refused while it is sent, and no answer read

const inBase64 = (image) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(image);
});

// Asks the program; of several questions in a row only the last one is answered.
function asking(path) {
  let asked = 0;
  return async (question, image, show) => {
    const number = ++asked;
    let answer;
    try {
      if (image && image.size > LARGEST) return show({ error: "the image is larger than 64 MB" });
      if (image) question = { ...question, image: image.size ? await inBase64(image) : "" };
      const body = JSON.stringify(question);
      answer = await (await fetch(path, { method: "POST", headers, body })).json();
    } catch (error) {
      answer = { error: "The program does not answer: is unicl-eval serve still running?" };
    }
    if (number === asked) show(answer);
  };
}

// Hands over an image that is chosen or dropped; gives functions to show one and to forget it.
function taking(zone, input, take) {
  const shown = zone.querySelector("img");
  const show = (file) => {
    if (!file) return;
    shown.src = URL.createObjectURL(file);
    shown.hidden = false;
    take(file);
  };
  input.addEventListener("change", () => show(input.files[0]));
  for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
    zone.addEventListener(name, (event) => {
      event.preventDefault();
      zone.classList.toggle("over", over);
      if (name === "drop") show(event.dataTransfer.files[0]);
    });
  }
  return { show, forget: () => { shown.hidden = true; input.value = ""; } };
}

const find = asking("/search");
function search(question, image) {
  at("search-error").textContent = "";
  at("status").textContent = "Searching ...";
  find(question, image, (answer) => {
    const found = answer.found || [];
    at("search-error").textContent = answer.error || "";
    at("status").textContent = answer.error ? "" : `The ${found.length} nearest images`;
    at("found").replaceChildren(...found.map((one) => {
      const address = `/image/${one.sample}${location.search}`;
      const title = one.caption || one.name;
      const more = one.others ? [`${one.others.toLocaleString("en")} more of it`] : [];
      const image = made("img", { src: address, alt: title, loading: "lazy" });
      return made("li", {},
        made("a", { href: address, target: "_blank" }, image),
        made("p", { className: "title" }, title),
        made("p", {}, [one.score.toFixed(3), ...one.labels, ...more].join(" · ")),
        made("p", { className: "where" }, `${one.source}/${one.name.replace(/^\/+/, "")}`));
    }));
  });
}
const example = taking(at("like"), at("example"), (file) => {
  at("text").value = "";
  search({}, file);
});
at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  example.forget();
  if (at("text").value.trim()) search({ text: at("text").value });
});

const name = asking("/classify");
let image = null;
let own = ""; // the model's classes, among which it chooses by label column
function classify() {
  if (!image) return;
  const classes = at("classes").value.split("\n").map((one) => one.trim()).filter(Boolean);
  const question = { template: at("template").value };
  if (classes.join("\n") !== own) question.classes = classes;
  name(question, image, (answer) => {
    at("error").textContent = answer.error || "";
    const found = Object.entries(answer.columns || {}).flatMap(([column, best]) =>
      best.slice(0, 5).map(([text, value]) => [`${column}: ${text}`, value]));
    at("answer").replaceChildren(...(found[0] ? found : answer.classes || []).map(([text, value]) => {
      const bar = made("div", { className: "bar" });
      bar.style.width = 100 * value + "%";
      const percent = made("span", {}, (100 * value).toFixed(1) + " %");
      return made("li", {}, made("div", { className: "name" }, made("span", {}, text), percent), bar);
    }));
  });
}
const photo = taking(at("drop"), at("image"), (file) => {
  image = file;
  classify();
});
document.addEventListener("paste", (event) => {
  (at("search").hidden ? photo : example).show(event.clipboardData.files[0]);
});
let waiting = 0;
for (const id of ["classes", "template"]) {
  at(id).addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(classify, 300);
  });
}
fetch("/model", { headers }).then((response) => response.json()).then((model) => {
  at("error").textContent = model.error || "";
  if (model.error) return;
  const hasSearch = model.num_images !== null;
  at("model").textContent = model.name;
  at("classes").value = own = model.classes.join("\n");
  at("search").hidden = !hasSearch;
  at("status").textContent = hasSearch ? `${model.num_images.toLocaleString("en")} images` : "";
  if (hasSearch) at("text").focus();
});
