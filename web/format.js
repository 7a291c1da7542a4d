/** Numbers as people read them, in the language of the front end. */

const GAP = "\u00a0"; // between a number and its unit: no line breaks there
const BYTE_UNITS = ["B", "KB", "MB", "GB", "TB"];

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** A number with at most `digits` decimals; "–" for what is not a finite number. */
export function number(value, digits = 0, language = "en") {
  if (!isNumber(value)) {
    return "–";
  }
  return new Intl.NumberFormat(language, { maximumFractionDigits: digits, minimumFractionDigits: 0 }).format(value);
}

/** Bytes in powers of 1000, three significant digits. */
export function bytes(value, language = "en") {
  if (!isNumber(value) || value < 0) {
    return "–";
  }
  let unit = 0;
  let size = value;
  while (size >= 999.5 && unit < BYTE_UNITS.length - 1) {
    size /= 1000;
    unit += 1;
  }
  const digits = unit === 0 || size >= 99.95 ? 0 : size >= 9.995 ? 1 : 2;
  return `${number(size, digits, language)}${GAP}${BYTE_UNITS[unit]}`;
}

/** A share (0.47) as "47 %". */
export function percent(share, language = "en", digits = 0) {
  if (!isNumber(share)) {
    return "–";
  }
  return new Intl.NumberFormat(language, { style: "percent", maximumFractionDigits: digits }).format(share);
}

/** Decibels, one decimal. */
export function decibels(value, language = "en") {
  if (!isNumber(value)) {
    return "–";
  }
  const text = new Intl.NumberFormat(language, { maximumFractionDigits: 1, minimumFractionDigits: 1 }).format(value);
  return `${text}${GAP}dB`;
}

/** A span of seconds: "0.4 s", "41 s", "2:05 min" or "1:02:05 h". */
export function duration(seconds, language = "en") {
  if (!isNumber(seconds) || seconds < 0) {
    return "–";
  }
  if (seconds < 9.95) {
    return `${number(seconds, 1, language)}${GAP}s`;
  }
  const whole = Math.round(seconds);
  const two = (value) => String(value).padStart(2, "0");
  if (whole < 60) {
    return `${whole}${GAP}s`;
  }
  if (whole < 3600) {
    return `${Math.floor(whole / 60)}:${two(whole % 60)}${GAP}min`;
  }
  return `${Math.floor(whole / 3600)}:${two(Math.floor((whole % 3600) / 60))}:${two(whole % 60)}${GAP}h`;
}

/** A layer name cut in its middle to at most `length` characters: both ends say where it is. */
export function shortened(name, length = 36) {
  if (name.length <= length) {
    return name;
  }
  const head = Math.ceil((length - 1) / 2);
  return `${name.slice(0, head)}…${name.slice(name.length - (length - 1 - head))}`;
}
