// Live fragments, counting times, copy buttons. Everything works without this file by loading the page again.

const skew = Date.now() - Date.parse(document.body.dataset.now);
const words = JSON.parse(document.body.dataset.words); // by what they are in English
const units = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];

function ago(then) {
  const seconds = Math.floor((Date.now() - skew - Date.parse(then)) / 1000);
  if (seconds < 5) return words["just now"];
  const [size, unit] = units.find(([size]) => seconds >= size);
  return words["{} ago"].replace("{}", `${Math.floor(seconds / size)} ${words[unit]}`);
}

function tellTimes(root = document) {
  for (const time of root.querySelectorAll("time[data-ago]")) {
    const said = ago(time.dateTime);
    if (time.textContent !== said) time.textContent = said;
  }
}

// What finds a link, or what unfolds something, again once its fragment was replaced.
function address(element) {
  if (element.matches("summary")) return `[data-keep="${CSS.escape(element.parentElement.dataset.keep)}"] > summary`;
  return element.hasAttribute("href") && `[href="${CSS.escape(element.getAttribute("href"))}"]`;
}

// A replaced fragment keeps its scroll position, because the element that scrolls stays; focus is put back, and what
// was unfolded stays so.
function replace(part, html) {
  const focused = part.contains(document.activeElement) && address(document.activeElement);
  const unfolded = [...part.querySelectorAll("details[data-keep][open]")].map((details) => details.dataset.keep);
  part.innerHTML = html;
  for (const details of part.querySelectorAll("details[data-keep]")) details.open = unfolded.includes(details.dataset.keep);
  tellTimes(part);
  if (focused) part.querySelector(focused)?.focus({ preventScroll: true });
}

const main = document.querySelector("main[data-live]");
const pulse = document.querySelector("[data-pulse]");
let source, seen = main?.dataset.at;

function say(word, state) {
  pulse.hidden = false;
  pulse.dataset.pulse = state;
  if (pulse.textContent !== word) pulse.textContent = word;
}

function open() {
  if (source || document.hidden) return;
  source = new EventSource(`${main.dataset.live}&after=${seen}`);
  source.onopen = () => say(words.Live, "on");
  source.onerror = () => {
    say(words.Reconnecting, "off");
    if (source?.readyState === EventSource.CLOSED) {
      close();
      setTimeout(open, 5000);
    }
  };
  source.addEventListener("signed-out", () => location.reload());
  for (const part of document.querySelectorAll("[data-part]")) {
    source.addEventListener(part.dataset.part, (event) => {
      seen = event.lastEventId || seen;
      replace(part, event.data);
      offerNew();
    });
  }
}

function close() {
  source?.close();
  source = undefined;
}

// A queue or a log never moves under the pointer; that there is more of it is said beside it.
function offerNew() {
  const again = document.querySelector("a.again");
  const newest = document.querySelector("[data-newest]");
  if (again && newest) again.hidden = newest.dataset.newest === again.dataset.shown;
}

if (main) {
  // a browser holds six connections to a host: hidden tabs give theirs back
  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  addEventListener("pagehide", close);
  addEventListener("pageshow", (event) => event.persisted && open());
  open();
}
setInterval(() => tellTimes(), 5000);

for (const button of document.querySelectorAll("[data-copy]")) {
  const from = document.getElementById(button.dataset.copy);
  button.hidden = false;
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(from.textContent);
      button.textContent = words.Copied;
    } catch {
      getSelection().selectAllChildren(from); // plain HTTP: no clipboard, but the text is marked for Ctrl+C
      button.textContent = words["Press Ctrl+C"];
    }
    setTimeout(() => (button.textContent = words.Copy), 2000);
  });
}

for (const select of document.querySelectorAll("select[data-submit]")) {
  select.form.querySelector("button").hidden = true;
  select.addEventListener("change", () => select.form.submit());
}
