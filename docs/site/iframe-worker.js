/* Lets the search work in a site that is opened from the disk, where browsers refuse to start a
   Worker: its script runs in a hidden frame instead. The theme's own stand-in would be fetched from
   the network. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(address) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      this.waiting = [];
      frame.onload = () => {
        const inside = frame.contentWindow;
        inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
        const script = inside.document.createElement("script");
        script.src = new URL(address, location.href);
        script.onload = () => {
          this.postMessage = (data) => inside.dispatchEvent(new MessageEvent("message", { data }));
          this.waiting.forEach((data) => this.postMessage(data));
        };
        inside.document.body.append(script);
      };
      frame.srcdoc = "<!DOCTYPE html><body></body>";
      document.body.append(frame);
    }
    postMessage(data) {
      this.waiting.push(data);
    }
    terminate() {}
  };
}
