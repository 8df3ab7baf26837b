"""The tables against figures read from the paper, and the networks against what pytorchcv knows of itself."""

import pytest
from pytorchcv.models import model_store

from gdfq.reproduce.recipe import recipe
from gdfq.reproduce.tables import SHIPPED, TABLES, offline

READ_FROM_THE_PAPER = [
    # table, network, row, bits, top-1, standard deviation, float
    ("table1", "resnet20_cifar10", "FT", 4, 93.11, None, 94.03),
    ("table1", "resnet20_cifar10", "ours", 4, 90.25, 0.30, 94.03),
    ("table1", "resnet20_cifar100", "ZeroQ", 4, 45.20, None, 70.33),
    ("table1", "bn_vgg16", "ZeroQ", 4, 1.15, None, 74.28),
    ("table1", "resnet18", "ours", 4, 60.60, 0.15, 71.47),
    ("table1", "inceptionv3", "FT", 4, 73.80, None, 78.80),
    ("table1", "inceptionv3", "ours", 4, 70.39, 0.20, 78.80),
    ("table2", "resnet20_cifar100", "no loss: the initial G", 4, 30.70, None, 70.33),
    ("table2", "resnet20_cifar100", "CE", 4, 54.51, None, 70.33),
    ("table2", "resnet20_cifar100", "BNS", 4, 44.40, None, 70.33),
    ("table3", "resnet20_cifar100", "CE", 4, 55.55, None, 70.33),
    ("table3", "resnet20_cifar100", "KD", 4, 62.98, None, 70.33),
    ("table4", "resnet20_cifar10", "without fixed BNS", 4, 89.21, None, 94.03),
    ("table4", "resnet20_cifar10", "with fixed BNS", 4, 90.23, None, 94.03),
    ("table4", "resnet20_cifar100", "without fixed BNS", 4, 61.12, None, 70.33),
    ("table5", "resnet20_cifar10", "MSE", 8, 93.86, None, 94.03),
    ("table5", "resnet20_cifar10", "ours", 4, 85.20, None, 94.03),
    ("table5", "resnet20_cifar100", "ACIQ", 5, 48.21, None, 70.33),
    ("table5", "resnet18", "KL", 6, 61.34, None, 71.47),
    ("table5", "resnet18", "ours", 4, 33.25, None, 71.47),
    ("table6", "resnet20_cifar100", "separate", 4, 61.81, None, 70.33),
    ("table6", "resnet20_cifar100", "alternating", 4, 63.91, None, 70.33),
    ("table7", "resnet20_cifar100", "stop above 90.00%", 4, 57.20, None, 70.33),
    ("table7", "resnet20_cifar100", "stop above 99.50%", 4, 59.67, None, 70.33),
    ("table7", "resnet20_cifar100", "without stopping condition", 4, 63.91, None, 70.33),
    ("table8", "resnet50", "ZeroQ", 4, 0.12, None, 77.72),
    ("table8", "mobilenetv2_w1", "ours", 6, 70.98, None, 73.03),
    ("table8", "shufflenet_g1_w1", "ours", 4, 21.78, None, 65.07),
    ("table9", "mobilenetv2_w1", "DFQ", 8, 66.06, None, 73.03),
    ("table9", "resnet18", "DFQ", 6, 14.67, None, 71.74),
    ("table9", "resnet18", "ours", 4, 60.52, None, 71.74),
]
# How many figures each table has without its FP32 column, and their sum.
CHECKSUMS = {
    "table1": (15, 902.37), "table2": (4, 193.52), "table3": (3, 182.44), "table4": (4, 304.47),
    "table5": (48, 3122.19), "table6": (2, 125.72), "table7": (5, 297.43), "table8": (12, 528.85),
    "table9": (12, 600.30),
}  # fmt: skip
NETWORKS = list(dict.fromkeys(cell.network for table in TABLES.values() for cell in table.cells))


@pytest.mark.parametrize(("table", "network", "row", "bits", "top1", "spread", "float_top1"), READ_FROM_THE_PAPER)
def test_figures_are_the_papers(table, network, row, bits, top1, spread, float_top1):
    (cell,) = [cell for cell in TABLES[table].cells if (cell.network.key, cell.row, cell.bits) == (network, row, bits)]
    (figure,) = cell.published
    assert (figure.top1, figure.spread, figure.float_top1) == (top1, spread, float_top1)
    assert figure.network == cell.network


@pytest.mark.parametrize(("table", "checksum"), CHECKSUMS.items())
def test_no_figure_is_missing_or_mistyped(table, checksum):
    figures = [cell.published[0].top1 for cell in TABLES[table].cells]
    assert (len(figures), round(sum(figures), 2)) == checksum


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.key)
def test_networks_are_pytorchcvs(network):
    _, _, _, _, _, data, image_size, shorter, *_ = model_store._model_sha1[network.key]
    assert network.model == f"pytorchcv:{network.key}"
    if network.data == "imagenet":
        assert (data, image_size, shorter) == ("in1k", network.image_size, 0.875)
    else:
        assert (data, network.image_size) == ("cf", 32)
        error, *_ = model_store._model_sha1[network.key]  # hundredths of a percent
        assert 100 - int(error) / 100 == pytest.approx(network.published_float, abs=0.05)


@pytest.mark.parametrize("is_offline", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_every_cell_has_a_recipe_of_its_own(name, is_offline):
    cells = (offline(TABLES[name]) if is_offline else TABLES[name]).cells
    configs = [recipe(cell) for cell in cells]
    for cell, config in zip(cells, configs, strict=True):
        quantizer = config.quantizer
        assert (config.method, quantizer.weight_bits, quantizer.activation_bits) == (cell.method, cell.bits, cell.bits)
        assert quantizer.target == "paper"
        assert not config.schedule.compare_with_calibration
    of_one_network = [(cell.network, config.model_dump_json()) for cell, config in zip(cells, configs, strict=True)]
    assert len(set(of_one_network)) == len(cells)


ABLATIONS = {
    ("table2", "no loss: the initial G"): {"generator": (0.0, 0.0)},
    ("table2", "CE"): {"generator": (1.0, 0.0)},
    ("table2", "BNS"): {"generator": (0.0, 0.1)},
    ("table2", "CE and BNS"): {"generator": (1.0, 0.1)},
    ("table3", "CE"): {"student": (1.0, 0.0)},
    ("table3", "KD"): {"student": (0.0, 1.0)},
    ("table3", "CE and KD"): {"student": (1.0, 1.0)},
}


@pytest.mark.parametrize(("row", "weights"), ABLATIONS.items(), ids=lambda value: " ".join(value))
def test_ablations_take_away_what_their_row_says(row, weights):
    table, label = row
    (cell,) = [cell for cell in TABLES[table].cells if cell.row == label]
    config = recipe(cell)
    found = {
        "generator": (config.generator.cross_entropy_weight, config.generator.bns_weight),
        "student": (config.student.cross_entropy_weight, config.student.distillation_weight),
    }
    assert {key: found[key] for key in weights} == weights


def test_fixed_bns_and_stopping_accuracies():
    assert [recipe(cell).student.fixed_bns for cell in TABLES["table4"].cells] == [False, True, False, True]
    stops = [recipe(cell).generator.stop_accuracy for cell in TABLES["table7"].cells]
    assert stops == [90.0, 95.0, 99.0, 99.5, None]


def test_offline_has_every_row_once_on_the_shipped_network():
    cells = {name: offline(table).cells for name, table in TABLES.items()}
    assert {name: len(merged) for name, merged in cells.items()} == {
        "table1": 3, "table2": 4, "table3": 3, "table4": 2, "table5": 16, "table6": 2, "table7": 5, "table8": 4,
        "table9": 6,
    }  # fmt: skip
    for name, merged in cells.items():
        assert {cell.network for cell in merged} == {SHIPPED}
        assert sum(len(cell.published) for cell in merged) == len(TABLES[name].cells)
    published = cells["table1"][2].published
    assert [figure.top1 for figure in published] == [90.25, 63.58, 67.10, 60.60, 70.39]


@pytest.mark.parametrize("name", TABLES)
def test_cells_that_are_merged_differ_in_their_network_alone(name):
    rows: dict = {}
    for cell in TABLES[name].cells:
        what = (cell.method, cell.settings, cell.separate)
        assert rows.setdefault((cell.row, cell.bits), what) == what
