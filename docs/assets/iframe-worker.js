// Browsers start no Worker from file://. There the search runs in a hidden frame of the page.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.srcdoc = "<!doctype html>";
      this.waiting = []; // what is posted before the script has loaded
      this.deliver = (data) => this.waiting.push(data);
      frame.addEventListener("load", () => {
        const inner = frame.contentWindow;
        inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
        const script = inner.document.createElement("script");
        script.src = new URL(url, document.baseURI);
        script.onload = () => {
          this.deliver = (data) => inner.dispatchEvent(new inner.MessageEvent("message", { data }));
          this.waiting.splice(0).forEach(this.deliver);
        };
        inner.document.head.append(script);
      }, { once: true });
      document.body.append(frame);
    }
    postMessage(data) {
      this.deliver(data);
    }
  };
}
