# The CUDA kernels without a GPU: compiled by g++ over the fibre emulation and compared with the CPU backend
# (l_kernels); compiled by nvcc for every architecture, spills refused (l_spills_*).
include(CheckLanguage)
check_language(CXX)
if(CMAKE_CXX_COMPILER)
  enable_language(CXX)
  file(GLOB kernel_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/kernels/*.cu)
  set_source_files_properties(${kernel_sources} PROPERTIES LANGUAGE CXX)
  add_library(sf_kernels_fibre STATIC ${kernel_sources} fibre/cuda_fibre.cpp)
  set_target_properties(sf_kernels_fibre PROPERTIES CXX_STANDARD 17)
  target_compile_definitions(sf_kernels_fibre PRIVATE KERNELS_FIBRE)
  target_include_directories(sf_kernels_fibre PUBLIC ${CMAKE_SOURCE_DIR} ${CMAKE_CURRENT_SOURCE_DIR}
                             PRIVATE ${CMAKE_SOURCE_DIR}/src)
  target_compile_options(sf_kernels_fibre PRIVATE -ffp-contract=off -fno-strict-aliasing -Wall -Wextra
                         -Wno-unknown-pragmas -Wno-array-bounds) # g++ cannot know that lists have at most 64 entries
  add_executable(test_l_kernels l_kernels.c)
  target_compile_definitions(test_l_kernels PRIVATE _GNU_SOURCE)
  target_link_libraries(test_l_kernels PRIVATE test_support sf_kernels_fibre sf_backend sf_think PkgConfig::CUNIT)
  set_target_properties(test_l_kernels PROPERTIES LINKER_LANGUAGE CXX)
  add_test(NAME l_kernels COMMAND test_l_kernels)
  set_tests_properties(l_kernels PROPERTIES ENVIRONMENT "${test_env}" TIMEOUT 240)
endif()

# The same suite on a device, where there is one.
if(SFUMATO_HAVE_CUDA)
  add_executable(test_l_kernels_gpu l_kernels.c)
  target_compile_definitions(test_l_kernels_gpu PRIVATE _GNU_SOURCE)
  target_link_libraries(test_l_kernels_gpu PRIVATE test_support sf_kernels sf_backend sf_think PkgConfig::CUNIT)
  add_test(NAME l_kernels_gpu COMMAND test_l_kernels_gpu)
  set_tests_properties(l_kernels_gpu PROPERTIES ENVIRONMENT "${test_env}" TIMEOUT 240 SKIP_RETURN_CODE 77)
endif()

find_package(Python3 COMPONENTS Interpreter QUIET)
if(SFUMATO_HAVE_CUDA AND Python3_FOUND)
  foreach(arch 80 90a 100)
    add_test(NAME l_spills_sm${arch}
             COMMAND Python3::Interpreter ${CMAKE_CURRENT_SOURCE_DIR}/check_spills.py --nvcc
                     ${CUDAToolkit_NVCC_EXECUTABLE} --arch ${arch} --source ${CMAKE_SOURCE_DIR})
    set_tests_properties(l_spills_sm${arch} PROPERTIES TIMEOUT 600)
  endforeach()
endif()
