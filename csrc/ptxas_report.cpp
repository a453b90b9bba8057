// What ptxas said of the kernels while the CUDA library was built. Apart from info.cpp, which takes long to compile.

extern const char* const ptxas_report;
const char* const ptxas_report =
#ifdef SEEMORE_PTXAS
#include "ptxas.inc"
#else
    ""
#endif
    ;
