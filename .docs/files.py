"""Copy the files of the repository that a page links to (figures, CSV files) into the site."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\((?:\.\./)+((?:examples|tests)/[^)#]+)\)")


def on_files(files, config):
    for page in list(files.documentation_pages()):
        for name in LINK.findall(page.content_string):
            if files.get_file_from_path(f"files/{name}") is None:
                files.append(File.generated(config, f"files/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, page, config, files):
    up = "../" * page.file.src_uri.count("/")
    return LINK.sub(lambda link: f"]({up}files/{link[1]})", markdown)
