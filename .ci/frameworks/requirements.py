"""Print what a wheel requires, without the packages that are named: requirements.py WHEEL PACKAGE ..."""

import re
import sys
import zipfile

wheel, *without = sys.argv[1:]
with zipfile.ZipFile(wheel) as archive:
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = archive.read(name).decode()
for requirement in re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE):
    package = re.match(r"[\w.-]+", requirement).group()
    if "extra ==" not in requirement and package.lower() not in without:
        print(requirement)
