"""Reading machine code: loops, spills inside and outside of them, buffers."""

from __future__ import annotations

from bench import triton_code

# A spill before the loop, one in it, one behind it; a wait that is tried again behind the end.
LISTING = """
        Function : some_kernel
        /*0000*/                   STL [R1], R4 ;
        /*0010*/                   IADD3 R4, R4, 0x1, RZ ;
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*0030*/              @!P0 BRA 0x00c0 ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0050*/                   LDL R5, [R1] ;
        /*0060*/               @P1 BRA 0x0010 ;
        /*0070*/                   LDL.LU R4, [R1] ;
        /*0080*/                   FADD R4, R4, R5 ;
        /*0090*/                   STG.E [R2], R4 ;
        /*00a0*/                   FADD R4, R4, R5 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*00d0*/              @!P0 BRA 0x00c0 ;
        /*00e0*/                   BRA 0x0040 ;
        /*00f0*/                   BRA 0x00f0 ;
        /*0100*/                   NOP ;
"""


def test_loops_and_spills():
    found = triton_code.count(LISTING)
    assert found == triton_code.Code(instructions=15, loop=6, tail=8, loop_spills=1, spills=3)


def test_without_products_there_is_no_main_loop():
    found = triton_code.count(LISTING.replace("HGMMA", "FFMA"))
    assert (found.loop, found.tail, found.loop_spills, found.spills) == (0, 0, 0, 3)


def test_buffers_are_those_of_the_operand_with_the_fewest():
    code = """
    %a = ttg.local_alloc : () -> !ttg.memdesc<4x128x64xbf16, #shared, #smem, mutable> loc(#l)
    %b = ttg.local_alloc {x = 1 : i32} : () -> !ttg.memdesc<2x64x256xbf16, #shared1, #smem>
    %c = ttg.local_alloc : () -> !ttg.memdesc<1x1x8xi64, #shared1, #smem, mutable>
    """
    assert triton_code.buffers({"ttgir": code}) == 2
    assert triton_code.buffers({"ttgir": ""}) == 0
