"use strict";
const at = (id) => document.getElementById(id);
let image = null;
let asked = 0;

async function ask() {
  if (!image) return;
  const number = ++asked;
  const question = {
    classes: at("classes").value.split("\n").map((one) => one.trim()).filter(Boolean),
    template: at("template").value,
  };
  let answer;
  try {
    const body = new Blob([JSON.stringify(question), "\n", image]);
    const response = await fetch("/classify", { method: "POST", body });
    answer = await response.json();
  } catch (error) {
    answer = { error: "The program does not answer: is unicl-eval serve still running?" };
  }
  if (number !== asked) return; // a newer question is under way
  at("error").textContent = answer.error || "";
  at("answer").replaceChildren(...(answer.classes || []).map(([name, value]) => {
    const item = document.createElement("li");
    const line = document.createElement("div");
    line.className = "name";
    for (const text of [name, (100 * value).toFixed(1) + " %"]) {
      line.append(Object.assign(document.createElement("span"), { textContent: text }));
    }
    const bar = document.createElement("div");
    bar.className = "bar";
    bar.style.width = 100 * value + "%";
    item.append(line, bar);
    return item;
  }));
}

function take(file) {
  if (!file) return;
  image = file;
  at("shown").src = URL.createObjectURL(file);
  at("shown").hidden = false;
  ask();
}

let waiting = 0;
for (const id of ["classes", "template"]) {
  at(id).addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(ask, 300);
  });
}
at("image").addEventListener("change", () => take(at("image").files[0]));
document.addEventListener("paste", (event) => take(event.clipboardData.files[0]));
for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  at("drop").addEventListener(name, (event) => {
    event.preventDefault();
    at("drop").classList.toggle("over", over);
    if (name === "drop") take(event.dataTransfer.files[0]);
  });
}
fetch("/model").then((response) => response.json()).then((model) => {
  at("model").textContent = model.name;
  at("classes").value = model.classes.join("\n");
  ask();
});
