/** Stands in for ComfyUI's `scripts/api.js`: an event target whose messages come from the recordings. */

class Api extends EventTarget {
  calls = [];

  apiURL(route) {
    return `/api${route}`;
  }

  fetchApi(route, options) {
    this.calls.push([route, options]);
    return fetch(this.apiURL(route), options);
  }

  async getCustomNodesI18n() {
    return (await this.fetchApi("/i18n")).json();
  }

  async interrupt(prompt) {
    this.calls.push(["interrupt", prompt]);
  }

  say(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

export const api = new Api();
