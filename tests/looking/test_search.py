"""Search through visual words."""

import numpy as np
import pytest
import torch

from helpers.command_line import error_of
from helpers.conversations import picture, tiny_processor
from helpers.tiny import tiny_model
from modeling_vwlmm.cli import main
from modeling_vwlmm.looking.search import Index, find_images, load_index, make_index, pool, save_index, search


sparse = pytest.importorskip("scipy.sparse")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for i in range(4):
        picture(i).save(tmp_path / "photos" / ("deep" if i % 2 else "") / f"{i}.png")
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no image")
    return tmp_path / "photos"


def test_pooling():
    words = torch.tensor([[[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]]])
    assert pool(words, "max").tolist() == [pytest.approx([0.5, 0.5, 0.7])]
    assert pool(words, "sum").tolist() == [pytest.approx(np.log([1.6, 1.7, 1.7]))]
    with pytest.raises(ValueError, match='pooling is "mean", expected max or sum'):
        pool(words, "mean")


def test_an_image_needs_all_words_and_a_word_that_is_everywhere_decides_nothing():
    weights = [[0.9, 0.9, 0.0], [0.9, 0.0, 0.6], [0.9, 0.9, 0.6], [0.9, 0.0, 0.0]]
    index = Index(sparse.csr_array(np.array(weights)), ["a", "b", "c", "d"], ["there", "red", "circle"])
    assert [path for path, _ in search(index, "Red circle", k=2)] == ["c", "a"]
    assert [path for path, _ in search(index, "there red", k=2)] == ["a", "c"]
    with pytest.raises(ValueError, match='no single word "circles", near it are circle'):
        search(index, "red circles")
    with pytest.raises(ValueError, match="nothing to search for"):
        search(index, " ")


def test_an_index_holds_the_visual_words_of_its_images(folder, tmp_path):
    model = tiny_model()
    processor = tiny_processor(model.config)
    paths = find_images(folder)
    index, skipped = make_index(model, processor, paths, batch_size=2)
    assert len(index.paths) == 4 and len(skipped) == 1 and "broken.jpg" in skipped[0]
    pixel_values = processor.image_processor([picture(0)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.visual_words(pixel_values).amax(1)[0].numpy()
    (row,) = [i for i, path in enumerate(index.paths) if path.endswith("0.png")]
    found = index.vectors.toarray()[row]
    assert found == pytest.approx(np.where(expected < 1e-3, 0, expected), abs=1e-6)
    save_index(index, tmp_path / "index")
    loaded = load_index(tmp_path / "index")
    assert loaded[1:] == index[1:] and (loaded.vectors != index.vectors).nnz == 0


def test_index_and_search_from_the_command_line(folder, tmp_path, model_folder, capsys):
    index = str(tmp_path / "index")
    main(["index", str(folder), index, "--model", str(model_folder)])
    printed = capsys.readouterr()
    assert "4 images in" in printed.out and "1 skipped" in printed.out and "broken.jpg" in printed.err
    main(["search", index, "w20 w21", "--top", "3", "--output", str(tmp_path / "found.png")])
    assert len(capsys.readouterr().out.splitlines()) == 3 and (tmp_path / "found.png").stat().st_size > 0
    image = next(folder.glob("*.png"))
    before = image.read_bytes()
    assert "which it would replace" in error_of(capsys, "search", index, "w20", "--output", str(image))
    assert image.read_bytes() == before
    assert 'no single word "w2000", near it are' in error_of(capsys, "search", index, "w2000")
    other = np.zeros((3, 99), dtype=np.float32)
    sparse.save_npz(f"{index}/vectors.npz", sparse.csr_array(other))
    assert "its files are of different ones: 3 vectors of 99 words" in error_of(capsys, "search", index, "w20")
    (tmp_path / "empty").mkdir()
    arguments = [str(tmp_path / "empty"), index, "--model", str(model_folder)]
    assert "has no images, expected files that end in" in error_of(capsys, "index", *arguments)
