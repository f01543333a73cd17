"""What Python tells the kernels: one text, in the kernels and in the file for editors."""

from dataclasses import replace

from vllm_metal.metal_kernel_backend.kernel_library import KERNELS, library_text
from vllm_metal.metal_kernel_backend.turboquant import constants_header, kernels
from vllm_metal.metal_kernel_backend.turboquant.constants_header import HEADER
from vllm_metal.metal_kernel_backend.turboquant.formats import GROUP_SIZE, LEVEL_UNIT
from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout


def test_the_file_for_editors_is_what_python_writes():
    assert (KERNELS / HEADER).read_text() == constants_header.constants_header()


def test_the_kernels_have_what_python_holds_and_not_what_the_file_says(monkeypatch):
    monkeypatch.setitem(constants_header.CONSTANT_VALUES, "CHUNK", 17)
    text = constants_header.constants_header()
    assert "constant constexpr int CHUNK = 17;\n" in text
    changed = replace(kernels.STORE, constants=(*kernels.STORE.constants[:1], (HEADER, text)))
    assert "int CHUNK = 17;" in library_text(changed)
    assert "int CHUNK = 16;" in library_text(kernels.STORE)


def test_whole_numbers_and_others_by_hand():
    text = constants_header.constants_header()
    assert f"constant constexpr int GROUP_SIZE = {GROUP_SIZE};\n" in text
    assert LEVEL_UNIT == 1 / 32 and "constant constexpr float LEVEL_UNIT = 0.03125f;\n" in text
    assert "constant constexpr float MAX_SCALE = 65504.0f;\n" in text


def test_the_parameters_of_a_layout_are_those_of_its_template_in_their_order():
    names = [name for name, _ in PageLayout.of("q4_0", "q2_0", 128, 3, 16).template()]
    text = constants_header.constants_header().replace(" \\\n ", "")
    assert f"#define PAGE_LAYOUT_PARAMETERS int {', int '.join(names)}\n" in text
    assert f"#define PAGE_LAYOUT_ARGUMENTS {', '.join(names)}\n" in text
