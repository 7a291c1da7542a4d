/** What ESLint asks of the front end and of its tests. */

import js from "@eslint/js";
import globals from "globals";

const rules = {
  "no-restricted-properties": [
    "error",
    { property: "innerHTML", message: "Use textContent: data is never markup." },
    { property: "outerHTML", message: "Use textContent: data is never markup." },
    { property: "insertAdjacentHTML", message: "Use textContent: data is never markup." },
  ],
  "max-lines": ["error", 300],
  curly: "error",
  eqeqeq: "error",
  "no-eval": "error",
  "no-implied-eval": "error",
  "no-new-func": "error",
  "no-shadow": "error",
  "no-unused-vars": "error",
  "no-var": "error",
  "object-shorthand": "error",
  "prefer-const": "error",
};

export default [
  { ignores: ["**/node_modules/**", ".venv*/**", "out/**"] },
  js.configs.recommended,
  { files: ["web/**/*.js"], languageOptions: { globals: globals.browser }, rules },
  {
    files: ["web/**/*.js"],
    ignores: ["web/comfy.js"],
    rules: {
      "no-restricted-imports": ["error", { patterns: [{ group: ["**/scripts/*"], message: "Only comfy.js imports from ComfyUI." }] }],
    },
  },
  {
    files: ["tests/web/**/*.{js,mjs}", "eslint.config.js"],
    languageOptions: { globals: { ...globals.node, ...globals.browser } },
    rules,
  },
];
