// The search runs in a worker, which browsers refuse to pages that are files: there a hidden frame takes its place.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      frame.srcdoc = "<!doctype html>"
      this.ready = new Promise((loaded) => {
        frame.onload = () => {
          const inside = frame.contentWindow
          inside.postMessage = (data) => this.tell(data)
          const script = inside.document.createElement("script")
          script.src = url
          script.onload = () => loaded(inside)
          inside.document.body.append(script)
        }
      })
      document.body.append(frame)
    }
    tell(data) {
      const event = new MessageEvent("message", { data })
      this.dispatchEvent(event)
      this.onmessage?.(event)
    }
    postMessage(data) {
      this.ready.then((inside) => inside.dispatchEvent(new inside.MessageEvent("message", { data })))
    }
    terminate() {}
  }
}
