"""Dead links of a built site: files that are not there, places on a page that nothing names, and whatever a page would
fetch from another machine by itself.

    python links.py SITE                   # says each once; exit code 1 if there is one
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.places = {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.places |= {v for k, v in attrs if k in ("id", "name") and v}
        if found.get("href"):
            self.links.append(found["href"])
        if found.get("src") or (tag == "link" and found.get("rel") == "stylesheet"):
            self.fetched.append(found.get("src") or found["href"])


def dead(site: Path) -> list[str]:
    pages = {p.resolve(): Page(p.read_text(encoding="utf-8")) for p in sorted(site.rglob("*.html"))}
    out = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links count from the root of a server
            continue
        where = path.relative_to(site.resolve())
        out += [f"{where}: fetches {u}" for u in page.fetched if urlsplit(u).netloc]
        for link in page.links + page.fetched:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                out.append(f"{where}: no file {link}")
            elif target in pages and unquote(parts.fragment) not in pages[target].places:
                out.append(f"{where}: no place {link}")
    return sorted(set(out))


def main() -> None:
    found = dead(Path(sys.argv[1]))
    for line in found:
        print(line, file=sys.stderr)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
