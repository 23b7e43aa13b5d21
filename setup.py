"Package metadata; every value comes from settings.ini, the one place nbdev, pip and the docs read."
from configparser import ConfigParser
from pathlib import Path
from shutil import copy2, copytree

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']


class BuildWithNotebooks(build_py):
    "Lets the run notebook and its presets travel with a wheel; in an editable installation `scilm` finds them in nbs/."

    def run(self):
        super().run()
        if self.editable_mode: return
        target = Path(self.build_lib)/cfg['lib_path']/'notebooks'
        (target/'presets').mkdir(parents=True, exist_ok=True)
        copy2(here/'nbs'/'run.ipynb', target)
        for preset in (here/'nbs'/'presets').glob('*.yaml'): copy2(preset, target/'presets')
        copytree(here/'nbs'/'presets'/'accelerate', target/'presets'/'accelerate', dirs_exist_ok=True)


setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    license_files=['LICENSE'], long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown', project_urls={'Documentation': cfg['doc_host'] + cfg['doc_baseurl']},
    python_requires=f">={cfg['min_python']}", packages=find_packages(include=[cfg['lib_path'], cfg['lib_path'] + '.*']),
    package_data={cfg['lib_path']: ['zoo/*', 'zoo/**/*']}, include_package_data=True, cmdclass={'build_py': BuildWithNotebooks},
    install_requires=cfg['requirements'].split(),
    extras_require={name: cfg[f'{name}_requirements'].split() for name in ('dev', 'api', 'lora', 'quantised', 'spreadsheets', 'pdf',
                                                                               'engines', 'deepspeed')},
    entry_points={'console_scripts': cfg['console_scripts'].split(),
                  'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]}, zip_safe=False)
