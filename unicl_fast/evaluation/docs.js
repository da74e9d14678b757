"use strict";
// Shows /openapi.json to people: no script of another host is needed for that.
const main = document.getElementById("main");
const add = (tag, text) => {
  main.append(Object.assign(document.createElement(tag), { textContent: text }));
};
fetch("/openapi.json").then((response) => response.json()).then(({ info, paths, components }) => {
  const end = (text) => text.split("/").pop();
  const last = (holder) => {
    const schema = holder && holder.content["application/json"];
    return schema ? end(schema.schema.$ref || "") || "an object" : "a file";
  };
  add("p", info.description);
  for (const [path, methods] of Object.entries(paths)) {
    for (const [method, one] of Object.entries(methods)) {
      add("h2", `${method.toUpperCase()} ${path}`);
      add("p", one.summary);
      if (one.requestBody) add("p", `Takes ${last(one.requestBody)} as JSON.`);
      add("p", `Answers ${last(one.responses[200])}.`);
      for (const status of Object.keys(one.responses).filter((each) => each !== "200")) {
        add("div", `${status}: ${components.responses[status].description}`);
      }
    }
  }
  add("h2", "Values");
  for (const [name, schema] of Object.entries(components.schemas)) {
    add("h3", name);
    add("pre", JSON.stringify(schema, null, 1));
  }
});
