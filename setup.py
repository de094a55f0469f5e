"""Package map; all metadata is in pyproject.toml.

patches/ and tools/ stand at the top of the repository so that a reader sees them, and install as
``megatron_moe.patches`` and ``megatron_moe.tools``: Megatron-LM's own root already has a package
named ``tools``.
"""

from setuptools import find_packages, setup

packages = find_packages(include=["megatron_moe*"])
package_dir = {"megatron_moe": "megatron_moe"}
for folder in ("patches", "tools"):
    for name in ["", *find_packages(folder)]:
        dotted = ".".join(filter(None, ["megatron_moe", folder, name]))
        packages.append(dotted)
        package_dir[dotted] = "/".join([folder, *filter(None, name.split("."))])

setup(packages=packages, package_dir=package_dir)
