/** Lets web/ be imported without a browser: ComfyUI's scripts become the stand-ins of the recorded page. */

import { register } from "node:module";

const hooks = `export function resolve(specifier, context, next) {
  const found = /^\\.\\.\\/\\.\\.\\/scripts\\/(app|api)\\.js$/.exec(specifier);
  return next(found ? ${JSON.stringify(new URL("../recorded/", import.meta.url).href)} + found[1] + ".js" : specifier, context);
}`;
register(`data:text/javascript,${encodeURIComponent(hooks)}`);
