"""Hooks of the documentation site: the Chinese pages get Chinese controls, and every page links its counterpart.

mkdocs.yml loads this file. Nothing else imports it.
"""

import re
from typing import Any

# Chinese page: English page with the same subject.
COUNTERPARTS = {
    "zh/index.md": "index.md",
    "zh/start.md": "start.md",
    "zh/train.md": "guides/sora.md",
    "zh/tune.md": "guides/lora.md",
    "zh/data.md": "guides/data.md",
    "zh/long-video.md": "guides/long-video.md",
    "zh/faq.md": "troubleshooting.md",
}


def on_files(files: Any, config: Any) -> Any:
    """Remember which pages exist."""
    config["extra"]["pages"] = {f.src_uri: f.url for f in files.documentation_pages()}
    return files


def on_page_context(context: Any, page: Any, config: Any, nav: Any) -> Any:
    """Set the language of the page and the links of the language switch."""
    pages, here = config["extra"]["pages"], page.file.src_uri
    chinese = here.startswith("zh/")
    config["theme"]["language"] = "zh" if chinese else "en"
    other = COUNTERPARTS.get(here) or next((zh for zh, en in COUNTERPARTS.items() if en == here), None)
    english, translated = (other, here) if chinese else (here, other)
    for entry, target in zip(config["extra"]["alternate"], (english, translated), strict=True):
        home = "index.md" if entry["lang"] == "en" else "zh/index.md"
        entry["link"] = pages.get(target) or pages.get(home, "index.html")
    return context


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Drop the alternate links of the head: the theme would look for a sitemap of each language."""
    return re.sub(r'<link rel="alternate" [^>]*>\n?', "", output)
