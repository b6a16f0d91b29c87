"""Copy the files of the repository that a page links to (figures, CSV files) into the site."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\((?:\.\./)+((?:examples|tests)/[^)#]+)\)")


def on_files(files, config):
    for page in list(files.documentation_pages()):
        for name in LINK.findall(Path(page.abs_src_path).read_text(encoding="utf-8")):
            if files.get_file_from_path(name) is None:
                files.append(File(name, str(ROOT), config["site_dir"], config["use_directory_urls"]))
    return files


def on_page_markdown(markdown, page, config, files):
    up = "../" * page.file.src_uri.count("/")
    return LINK.sub(lambda link: f"]({up}{link[1]})", markdown)
