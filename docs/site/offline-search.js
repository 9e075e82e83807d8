// A browser starts no worker for a page from the disk (file://), so the search runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(url) {
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inside = this.frame.contentWindow;
      inside.postMessage = (data) =>
        setTimeout(() => this.onmessage?.(new MessageEvent("message", { data: structuredClone(data) })));
      this.ready = new Promise((resolve) => {
        const script = inside.document.createElement("script");
        Object.assign(script, { src: new URL(url, location.href), onload: resolve });
        inside.document.body.append(script);
      });
    }

    async postMessage(data) {
      const copy = structuredClone(data);
      await this.ready;
      this.frame.contentWindow.onmessage({ data: copy });
    }

    terminate() {
      this.frame.remove();
    }
  };
}
