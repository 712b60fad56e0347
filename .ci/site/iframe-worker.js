/* Search without a server: browsers start no Worker from a file, so its script runs in a hidden frame instead. */
window.IFrameWorker = class extends EventTarget {
  constructor(url) {
    super()
    const frame = document.createElement("iframe")
    frame.hidden = true
    document.body.append(frame)
    this.inside = frame.contentWindow
    this.inside.postMessage = data => {
      const event = new MessageEvent("message", { data })
      this.dispatchEvent(event)
      if (this.onmessage) this.onmessage(event)
    }
    this.inside.importScripts = (...urls) => urls.reduce((before, u) => before.then(() => this.load(u)), Promise.resolve())
    this.ready = this.load(url)
  }
  load(url) {
    const page = this.inside.document
    const script = page.createElement("script")
    script.src = new URL(url, location)
    return new Promise((resolve, reject) => {
      script.onload = resolve
      script.onerror = reject
      page.body.append(script)
    })
  }
  postMessage(data) {
    this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })))
  }
  terminate() {
    this.inside.frameElement.remove()
  }
}
window.Worker = window.IFrameWorker
